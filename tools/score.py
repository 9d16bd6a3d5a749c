"""Score spans: ``python tools/score.py method.cache=... method.reference=...``, or the same under ``torchrun``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("score")
def main(config: DictConfig) -> None:
    """Run the job that the configuration describes."""
    from ctpd_nemo.pipeline.config import run_config
    from ctpd_nemo.pipeline.score import score

    score(run_config(config))


if __name__ == "__main__":
    main()
