"""The whole recipe in a small world made on the spot: ``python tools/quickstart.py``, or under ``torchrun``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("quickstart")
def main(config: DictConfig) -> None:
    """Make the world, run the stages, evaluate, report."""
    from ctpd_nemo.pipeline.quickstart import quickstart
    from ctpd_nemo.report.run_page import add_run_page

    quickstart(config)
    add_run_page(config.run_dir)


if __name__ == "__main__":
    main()
