"""What a job was started with: its config, its command line, and a record of every start.

``config.json`` has every value and ``origin.json`` the command line, so that a report can tell what was changed from
what an experiment file says. ``starts.jsonl`` has a line for each start, the first and those that went on: both of
these, what it ran on and what it read.
"""

import datetime
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.base_models import RECORD, without_places
from ctpd_nemo.json_files import read_object, read_rows
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.parallel.checkpoint_files import write_whole
from ctpd_nemo.pipeline.environment import differences, environment
from ctpd_nemo.run_folder import make_run_folder
from ctpd_nemo.text_files import naming

logger = logging.getLogger(__name__)

FILE = "origin.json"
CONFIG = "config.json"
STARTS = "starts.jsonl"


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


def write_record(run: RunConfig, fingerprints: Mapping[str, str], step: int = 0) -> dict[str, Any]:
    """Write down what this start of a job is; rank 0 does it, when the job begins its work.

    Args:
        run: The configuration.
        fingerprints: Of the data, tokenizers, templates, weights and scores that it reads.
        step: From which it goes on.

    Returns:
        What ``starts.jsonl`` has of it, for ``restore_record``.

    Raises:
        OSError: It cannot be written.
    """
    folder = Path(run.run_dir)
    make_run_folder(folder)
    config, origin = asdict(run), _origin(run)
    start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "folder": os.getcwd(),
        **environment(),
        "fingerprints": dict(fingerprints),
        "origin": None if origin is None else asdict(origin),
        "config": config,
    }
    _write_values(folder, start)
    if run.from_run is not None and step == 0:
        _compare(Path(run.from_run), folder, start)
    _append(folder / STARTS, start)
    return start


def restore_record(folder: Path, start: Mapping[str, Any]) -> None:
    """Write what is no longer there of the record of a job that is at work.

    Args:
        folder: The run folder.
        start: What ``write_record`` has returned.

    Raises:
        OSError: It cannot be written.
    """
    _write_values(folder, start)
    if not (folder / STARTS).is_file():
        _append(folder / STARTS, start)


def _write_values(folder: Path, start: Mapping[str, Any]) -> None:
    write_whole(folder / CONFIG, json.dumps(start["config"], indent=2) + "\n")
    if start["origin"] is not None:
        write_whole(folder / FILE, json.dumps(start["origin"], indent=2) + "\n")


def read_origin(folder: Path) -> Origin | None:
    """What the job of a run folder was started with; ``None`` where nothing was written down.

    Raises:
        InputError: The file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return Origin(**read_object(path, "the command line of a job"))
    except TypeError as error:
        raise InputError(str(path), f"what no job wrote ({error})", "the command line of a job") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Every value that the job of a run folder ran with, or the run that a folder was exported of.

    Raises:
        InputError: There is no such file, or it is damaged.
    """
    if (folder / RECORD).is_file():
        # An export: its config.json is the model's.
        config = read_object(folder / RECORD, "the record of an export").get("config")
        if not isinstance(config, dict) or not config:
            raise InputError(f"{folder / RECORD}, config", repr(config), "the config of the run that was exported")
        beside = folder.parent / CONFIG
        # The run's own has where everything is; an export that has left it has names alone.
        if beside.is_file() and without_places(own := read_object(beside)) == config:
            return own
        return config
    return read_object(folder / CONFIG, "the config that a job wrote into its run folder")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a job that were written down as a whole, the first one first.

    Raises:
        InputError: The file is larger than any such record.
    """
    path = folder / STARTS
    if not path.is_file():
        return []
    starts = []
    for line in read_rows(path):
        try:
            start = json.loads(line)
        except (ValueError, RecursionError):
            # A process that was killed, or a full disk, leaves half a line.
            continue
        if isinstance(start, dict):
            starts.append(start)
    return starts


def _origin(run: RunConfig) -> Origin | None:
    """The command line of this process; ``None`` where it was not started by one of the tools."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    own = list(hydra.overrides.task)
    if run.from_run is not None and (first := read_origin(Path(run.from_run))) is not None:
        return Origin(first.config, first.experiment, first.method, [*first.overrides, *own])
    choices = hydra.runtime.choices
    return Origin(str(hydra.job.config_name), choices.get("experiment"), choices.get("method"), own)


def _append(path: Path, start: Mapping[str, Any]) -> None:
    """Add a line, also after one that was cut off."""
    cut = path.is_file() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(start) + "\n")


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _compare(first: Path, folder: Path, start: Mapping[str, Any]) -> None:
    """Warn of what is not as it was in the run that is done again."""
    starts = read_starts(first)
    if not starts:
        logger.warning("%s: no record of versions and fingerprints in %s to compare with", folder, first / STARTS)
        return
    for name, before, now in differences(starts[-1], start):
        logger.warning("%s: %s is %s, where %s had %s", folder, name, _shown(now), first, _shown(before))


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
