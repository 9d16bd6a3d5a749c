"""Weights & Biases: the arguments of NeMo's experiment manager, and a run that stays the same one over restarts."""

import contextlib
import inspect
import logging
import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.parallel.checkpoint_files import write_whole
from ctpd_nemo.pipeline.rank_zero import on_rank_0

logger = logging.getLogger(__name__)

# NeMo moves files in its folder aside at every start, and leaves folders.
_ID = "wandb/run-id"
_PROJECT = "ctpd_nemo"
_KEY = "trainer.wandb"
# What the service takes of a project's name and of a run's, in characters, and what it does not take in the former.
_LONGEST = 128
_NOT_IN_PROJECTS = "/\\#?%:"
_REMEDY = "WANDB_MODE=offline, or trainer.wandb=false"


def check_wandb(run: RunConfig) -> None:
    """Stop before a job begins where it could not log to Weights & Biases; nobody is asked for a key.

    Raises:
        InputError: There is no package, no key, or no project of such a name.
    """
    if not run.trainer.wandb:
        return
    if find_spec("wandb") is None:
        raise InputError(_KEY, "no package wandb", 'it: pip install -e ".[wandb]"')
    project = run.trainer.wandb
    if isinstance(project, str) and (len(project) > _LONGEST or set(project) & set(_NOT_IN_PROJECTS)):
        expected = f"true, or a project's name: {_LONGEST} characters at most, none of {_NOT_IN_PROJECTS}"
        raise InputError(_KEY, repr(project), expected)
    # Rank 0 alone logs, and its node alone may have a key.
    if os.environ.get("RANK", "0") == "0" and not _may_log():
        raise InputError(_KEY, "no key of Weights & Biases", f"one, by wandb login or WANDB_API_KEY; or {_REMEDY}")


def _may_log() -> bool:
    """Whether a run can begin: it stays on this machine, or there is a key for the service."""
    _silence()
    with _named():
        import wandb

        # By the environment, and by what wandb offline has left.
        if wandb.setup().settings.mode not in ("online", "run", "shared") or os.environ.get(
            "WANDB_IDENTITY_TOKEN_FILE"
        ):
            return True
        # New versions do not ask where they are told not to; those before have another way to look.
        if "prompt" in inspect.signature(wandb.login).parameters:
            return bool(wandb.login(prompt=False, verify=False))
        return bool(wandb.api.api_key)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """What Weights & Biases says of its settings, a key or its service, as an error of the config."""
    try:
        yield
    except Exception as error:
        # Before it is imported nobody knows its errors; they are told by where they come from.
        if (
            not isinstance(error, ImportError | ValueError | OSError)
            and type(error).__module__.split(".")[0] != "wandb"
        ):
            raise
        found = f"Weights & Biases that cannot be used ({type(error).__name__}: {error})"
        raise InputError(_KEY, found, f"a run that can begin; or {_REMEDY}") from error


def _silence() -> None:
    """No banners: that a run is logged, and where, is told in one line by this project."""
    os.environ.setdefault("WANDB_SILENT", "true")


def wandb_arguments(run: RunConfig, logs: Path) -> dict[str, Any]:
    """What ``exp_manager`` is to be told; nothing without ``trainer.wandb``. Every rank calls it together.

    Args:
        run: The configuration.
        logs: Where the id of the run is kept, so that one that goes on is shown as one.
    """
    if not run.trainer.wandb:
        return {}
    _silence()
    folder = Path(run.run_dir).absolute()
    project = _PROJECT if run.trainer.wandb is True else run.trainer.wandb
    return {
        "create_wandb_logger": True,
        "wandb_logger_kwargs": {
            "project": project,
            "name": f"{folder.parent.name}/{folder.name}"[-_LONGEST:],
            "id": on_rank_0(lambda: _kept_id(logs)),
            "resume": "allow",
            "save_dir": str(logs),
        },
    }


def begin(trainer: pl.Trainer) -> None:
    """Begin the run, if there is to be one, before there is a model; every rank calls it together.

    Lightning would with the first point: where the service does not answer, or does not know the key, all is lost that
    was done until then.

    Raises:
        InputError: It cannot begin.
    """
    shown = [each for each in trainer.loggers if isinstance(each, WandbLogger)]
    for each in shown:
        # An argument that Lightning gives to every run, unset, and which wandb warns has no effect.
        if each._wandb_init.get("anonymous") is None:
            each._wandb_init.pop("anonymous", None)

    def start() -> None:
        with _named():
            for each in shown:
                _ = each.experiment

    on_rank_0(start)


class WandbRun(Callback):
    """Says where the run is shown, and ends it: the next stage of a pipeline is another one."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say it."""
        for run in _runs(trainer):
            place = run.url or f"offline, in {Path(run.dir).parent}"
            logger.info("%-13s Weights & Biases: %s", Path(pl_module.run.run_dir).name, place)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """End it; where the job fails the process ends, and wandb tells it from that."""
        for run in _runs(trainer):
            run.finish()


def _runs(trainer: pl.Trainer) -> list[Any]:
    """Those of rank 0, which alone has one."""
    shown = [each for each in trainer.loggers if isinstance(each, WandbLogger)] if trainer.is_global_zero else []
    return [each.experiment for each in shown]


def _kept_id(logs: Path) -> str:
    """The id that an earlier start has left, or a new one."""
    path = logs / _ID
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
