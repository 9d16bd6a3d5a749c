"""Score spans under frozen teachers: ``python tools/score.py method.cache=... method.reference=...``, or under torchrun."""

from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.entry import entry_point
from ctpd_nemo.pipeline.score import score


@hydra_runner(config_path="../conf", config_name="score")
@entry_point
def main(config: DictConfig) -> None:
    """Run the job that the configuration describes."""
    score(run_config(config))


if __name__ == "__main__":
    main()
