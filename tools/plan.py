"""What a run will cost, without a GPU: ``python tools/plan.py experiment=... gpus=64 hardware=h100``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("plan")
def main(config: DictConfig) -> None:
    """Plan the stages of the experiment, and print what was found."""
    from ctpd_nemo.planner.plan import plan

    print(plan(config).as_text())


if __name__ == "__main__":
    main()
