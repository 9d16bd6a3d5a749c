"""``tools/train.py --from-run FOLDER``: the same run once more, in a folder of its own."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.base import FOLDERS
from ctpd_nemo.pipeline.origin import CONFIG, read_config, read_starts

FLAG = "--from-run"
# The name under which Hydra finds the config of that run.
CONFIG_NAME = "from_run"


def take_flag(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder that a command line names with ``--from-run``, and what else it has, which is Hydra's.

    Raises:
        InputError: The flag has no folder, or is there twice.
    """
    folders: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
            continue
        folder = value if equals else next(words, "")
        # What follows a bare flag may be meant for Hydra; a folder of such a name is written --from-run=a=b.
        if not folder or folder.startswith("-") or ("=" in folder and not equals):
            raise InputError(FLAG, repr(folder) if folder else "nothing", "the folder of a run")
        folders.append(folder)
    if len(folders) > 1:
        raise InputError(FLAG, " and ".join(folders), "one folder")
    return (folders[0] if folders else None), rest


def offer_config(folder: str) -> str:
    """Give Hydra the config that a training job wrote into its run folder; the name that Hydra finds it under.

    What the command line adds is changed in it. Its ``run_dir`` is ``FOLDER-again``.

    Raises:
        InputError: The folder has no config of a training job.
    """
    from hydra.core.config_store import ConfigStore

    path = Path(folder)
    if not path.name or path.name == "..":
        path = path.resolve()
    values = read_config(path)
    method: Any = values.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str) or method["name"] == "score":
        name = method.get("name") if isinstance(method, dict) else method
        raise InputError(f"{path / CONFIG}, method.name", repr(name), "a method that trains")
    starts = read_starts(path)
    if starts and isinstance(before := starts[-1].get("folder"), str) and before != os.getcwd():
        _make_absolute(values, Path(before))
    values |= {"run_dir": str(path.with_name(f"{path.name}-again")), "from_run": str(path)}
    ConfigStore.instance().store(name=CONFIG_NAME, node=OmegaConf.create(values))
    return CONFIG_NAME


def _make_absolute(values: dict[str, Any], folder: Path) -> None:
    """Make what the job read from be found from another working folder than its own."""
    model, data = values.get("model") or {}, values.get("data") or {}
    for part, keys in (
        *((model.get(side) or {}, ("path", "tokenizer")) for side in ("student", "teacher")),
        (values["method"], FOLDERS),
    ):
        for key in keys:
            if isinstance(part.get(key), str):
                part[key] = str(folder / part[key])
    for key in ("train", "validation"):
        data[key] = [str(folder / path) for path in data.get(key) or []]
    if data.get("encoded") not in (None, "auto"):
        data["encoded"] = str(folder / data["encoded"])
