"""Train by method: ``python tools/train.py method=ctpd model.student.path=...``, or the same under ``torchrun``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("train")
def main(config: DictConfig) -> None:
    """Run the job that the configuration describes."""
    from ctpd_nemo.pipeline.config import run_config
    from ctpd_nemo.pipeline.train import train

    train(run_config(config))


if __name__ == "__main__":
    main()
