"""``stage.json``: what a stage was computed from, and whether it is complete."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ctpd_nemo.convert.fingerprint import weights_fingerprint
from ctpd_nemo.data.paths import expand
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import load_side
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.parallel.checkpoint_files import write_whole
from ctpd_nemo.pipeline.recipe import Stage

STATUS = "stage.json"
# How the work is cut up changes results by rounding alone: a run may go on with other values of these.
_CUTS_OF_WORK = ("num_workers", "microbatch_tokens", "packing", "encoded")
# What only says more, or less.
_WORDS = ("warn_skipped",)


@dataclass(frozen=True)
class StageStatus:
    """What ``stage.json`` holds.

    Attributes:
        fingerprint: See :func:`stage_fingerprint`.
        settings: See :func:`settings_fingerprint`; empty where the stage was run before there was one.
        complete: Whether the stage is done.
        seconds: Wall time of the run that completed it.
    """

    fingerprint: str
    settings: str = ""
    complete: bool = False
    seconds: float = 0.0


def read_status(folder: Path) -> StageStatus | None:
    """The status of a stage, or ``None`` where it has not begun.

    Raises:
        InputError: The file is not what a stage writes.
    """
    path = folder / STATUS
    if not path.exists():
        return None
    expected = "a stage's status, or none to begin"
    try:
        status = StageStatus(**read_object(path, expected))
    except TypeError as error:
        raise InputError(str(path), f"what no stage wrote ({error})", expected) from error
    kinds = {"fingerprint": str, "settings": str, "complete": bool, "seconds": int | float}
    for name, kind in kinds.items():
        if not isinstance(getattr(status, name), kind):
            raise InputError(f"{path}, {name}", f"what no stage wrote ({getattr(status, name)!r})", expected)
    return status


def write_status(folder: Path, status: StageStatus) -> None:
    """Write the status of a stage to its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STATUS, json.dumps(asdict(status), indent=2) + "\n")


def settings_fingerprint(run: RunConfig, stage: Stage, sources: Mapping[str, str]) -> str:
    """A hash of the values that the numbers of a stage depend on: what can be said without the files at hand.

    Args:
        run: The config of the stage.
        stage: Which it is.
        sources: The same of the stages that it builds on, by the config key of what each gives.
    """
    names = [Path(path).name for path in _data(run)]
    content: dict[str, Any] = {**_settings(run, stage, sources), "files": names}
    for name in _sides(run, stage):
        side = getattr(run.model, name)
        path = side.path if f"model.{name}.path" not in stage.inputs else None
        named = [Path(one).name if one is not None else None for one in (path, side.tokenizer, side.chat_template)]
        content[name] = named + ([side.chat_template_kwargs] if side.chat_template_kwargs else [])
    return _hash(content)


def stage_fingerprint(run: RunConfig, stage: Stage, sources: Mapping[str, str]) -> str:
    """A hash of everything that the numbers of a stage depend on, folders by content and not by place.

    Args:
        run: The config of the stage.
        stage: Which it is.
        sources: Fingerprints of the stages that it builds on, by the config key of what each gives.

    Raises:
        InputError: A file or folder cannot be used.
    """
    content = _settings(run, stage, sources)
    content["files"] = [(path.name, _content(path)) for path in expand(_data(run))]
    for name in _sides(run, stage):
        side, own_folder = getattr(run.model, name), f"model.{name}.path" not in stage.inputs
        if own_folder or side.tokenizer or side.chat_template or side.chat_template_kwargs:
            reader = load_side(side, f"model.{name}")
            content[name] = [reader.tokenizer_fingerprint, reader.template_fingerprint]
            if own_folder and side.path is not None:
                content[name].append(weights_fingerprint(side.path))
    return _hash(content)


def _data(run: RunConfig) -> list[str]:
    return [*run.data.train, *run.data.validation]


def _sides(run: RunConfig, stage: Stage) -> tuple[str, ...]:
    both = stage.scores or METHODS[run.method.name].two_sided
    return ("student", "teacher") if both else (run.policy,)


def _settings(run: RunConfig, stage: Stage, sources: Mapping[str, str]) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(run))
    assert isinstance(values, dict)
    left_out = [*_CUTS_OF_WORK, *_WORDS, "train", "validation"]
    # As all stages that were done before there was a choice.
    if run.data.response_text == "written":
        left_out.append("response_text")
    if run.data.max_row_bytes is None:
        left_out.append("max_row_bytes")
    content: dict[str, Any] = {
        "seed": run.seed,
        "precision": values["precision"],
        "data": {key: value for key, value in values["data"].items() if key not in left_out},
        "method": {key: value for key, value in vars(run.method).items() if f"method.{key}" not in sources},
        "stages": dict(sources),
    }
    if stage.scores:
        for name in ("cache", "together", "microbatch_tokens"):
            del content["method"][name]
    else:
        trainer = values["trainer"]
        content |= {"optim": values["optim"], "epochs": trainer["epochs"], "max_steps": trainer["max_steps"]}
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names."""

    def files() -> Iterator[Path]:
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]

    total = hashlib.sha256()
    for file in files():
        if not file.is_file():
            raise InputError(str(file), "no such file", "a preference file")
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        total.update(f"{file.relative_to(path) if path.is_dir() else ''}\0".encode() + digest.digest())
    return total.hexdigest()
