"""What a job was started with, so that a report can tell what was changed from what an experiment file says."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ctpd_nemo.errors import InputError

FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """A command line.

    Attributes:
        config: The file in ``conf`` that the tool reads, without its ending.
        experiment: The choice in ``conf/experiment``, if one was made.
        method: The choice in ``conf/method``, where there is one to make.
        overrides: What was given on the command line.
    """

    config: str
    experiment: str | None
    method: str | None
    overrides: list[str]


def write_origin(folder: Path) -> None:
    """Write down what this process was started with; nothing where it was not started by one of the tools."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    choices = hydra.runtime.choices
    origin = Origin(
        str(hydra.job.config_name), choices.get("experiment"), choices.get("method"), list(hydra.overrides.task)
    )
    (folder / FILE).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """What the job of a run folder was started with; ``None`` where nothing was written down.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Origin(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(str(path), f"what no job wrote ({error})", "the command line of a job") from error
