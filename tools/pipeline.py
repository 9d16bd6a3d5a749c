"""All stages in a row: ``python tools/pipeline.py model.student.path=... model.teacher.path=... data.train=[...]``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("pipeline")
def main(config: DictConfig) -> None:
    """Run the stages that are not yet done."""
    from ctpd_nemo.pipeline.stages import run_pipeline

    run_pipeline(config)


if __name__ == "__main__":
    main()
