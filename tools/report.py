"""A run to look at: ``python tools/report.py run_dir=runs/mine``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("report")
def main(config: DictConfig) -> None:
    """Write the page, and print where it is."""
    from ctpd_nemo.pipeline.config import typed
    from ctpd_nemo.report.run_page import RunPageConfig, write_run_page

    print(write_run_page(typed(RunPageConfig, config)))


if __name__ == "__main__":
    main()
