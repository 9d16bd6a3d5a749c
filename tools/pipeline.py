"""All stages in a row: ``python tools/pipeline.py model.student.path=... model.teacher.path=... data.train=[...]``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("pipeline")
def main(config: DictConfig) -> None:
    """Run the stages that are not yet done."""
    from ctpd_nemo.pipeline.stages import run_pipeline
    from ctpd_nemo.report.run_page import add_run_page

    run_pipeline(config)
    add_run_page(config.run_dir)


if __name__ == "__main__":
    main()
