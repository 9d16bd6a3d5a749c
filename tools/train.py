"""Train by method: ``python tools/train.py method=ctpd model.student.path=...``, or under torchrun."""

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.entry import entry_point
from ctpd_nemo.pipeline.train import train


@hydra_runner(config_path="../conf", config_name="train")
@entry_point
def main(config: DictConfig) -> None:
    """Run the job that the configuration describes."""
    train(run_config(config))


if __name__ == "__main__":
    main()
