"""``tools/train.py --from-run FOLDER``: the same run once more, in a folder of its own."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from ctpd_nemo.conf_folder import CONF
from ctpd_nemo.data.paths import relative_to
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.base import FOLDERS
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.pipeline.config import check_literal, run_config
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
    """Give Hydra the config that a training job wrote into its run folder, or that an export of it has beside its card.

    What the command line adds is changed in it. Its ``run_dir`` is ``FOLDER-again``.

    Returns:
        The name that Hydra finds it under.

    Raises:
        InputError: The folder has no config of a training job, or one that asks for something to be filled in.
    """
    from hydra.core.config_store import ConfigStore

    path = Path(folder)
    if not path.name or path.name == "..":
        path = path.resolve()
    values = read_config(path)
    check_literal(values, str(path / CONFIG))
    try:
        run = run_config(OmegaConf.create(values))
    except InputError as error:
        if error.place == str(path / CONFIG):
            raise
        raise InputError(f"{path / CONFIG}, {error.place}", error.found, error.expected) from error
    if run.method.name not in METHODS:
        raise InputError(f"{path / CONFIG}, method.name", repr(run.method.name), "one of " + ", ".join(METHODS))
    starts = read_starts(path)
    if starts and isinstance(before := starts[-1].get("folder"), str) and before != os.getcwd():
        _make_absolute(run, Path(before))
    run.run_dir, run.from_run = str(path.with_name(f"{path.name}-again")), str(path)
    # Names of folders, too, are someone's choice.
    check_literal(asdict(run), str(path / CONFIG))
    ConfigStore.instance().store(name=CONFIG_NAME, node=OmegaConf.create(asdict(run)))
    return CONFIG_NAME


def _make_absolute(run: RunConfig, folder: Path) -> None:
    """Have what the job read found from another working folder than its own."""
    for part, keys in (
        (run.model.student, ("path", "tokenizer")),
        (run.model.teacher, ("path", "tokenizer")),
        (run.method, FOLDERS),
    ):
        for key in keys:
            if getattr(part, key, None) is not None:
                setattr(part, key, str(folder / getattr(part, key)))
    for side in (run.model.student, run.model.teacher):
        # A template is one by its braces; else it is the path of one, which may be in ``conf``.
        template = side.chat_template
        if template is not None and "{" not in template:
            own = (folder / template).is_file() or not (CONF / template).is_file()
            side.chat_template = str(folder / template) if own else template
    run.data.train = [relative_to(folder, path) for path in run.data.train]
    run.data.validation = [relative_to(folder, path) for path in run.data.validation]
    if run.data.encoded not in (None, "auto"):
        run.data.encoded = str(folder / run.data.encoded)
