"""A table of the paper: ``python tools/reproduce.py table=1 experiment=tiny``; see ``conf/reproduce.yaml``."""

from omegaconf import DictConfig

from ctpd_nemo.pipeline.entry import tool


@tool("reproduce")
def main(config: DictConfig) -> None:
    """Run or hand out what is missing, and print the table."""
    from hydra.core.hydra_config import HydraConfig

    from ctpd_nemo.reproduce.job import reproduce

    started = HydraConfig.get()
    tables = reproduce(config, str(started.runtime.choices.experiment), list(started.overrides.task))
    print("\n\n".join(table.as_text() for table in tables))


if __name__ == "__main__":
    main()
