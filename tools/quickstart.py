"""The whole recipe in a small world made on the spot: ``python tools/quickstart.py``, or under ``torchrun``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("quickstart")
def main(config: DictConfig) -> None:
    """Make the world, run the stages, evaluate, report."""
    from ctpd_nemo.pipeline.quickstart import quickstart

    quickstart(config)


if __name__ == "__main__":
    main()
