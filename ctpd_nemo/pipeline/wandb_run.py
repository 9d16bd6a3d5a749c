"""Weights & Biases: the arguments of NeMo's experiment manager, and a run that stays the same one over restarts."""

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.parallel.checkpoint_files import write_whole
from ctpd_nemo.pipeline.rank_zero import on_rank_0

logger = logging.getLogger(__name__)

# NeMo moves files in its folder aside at every start, and leaves folders.
_ID = "wandb/run-id"
_PROJECT = "ctpd_nemo"


def wandb_arguments(run: RunConfig, logs: Path) -> dict[str, Any]:
    """What ``exp_manager`` is to be told; nothing without ``trainer.wandb``. Every rank calls it together.

    Args:
        run: The configuration.
        logs: Where the id of the run is kept, so that one that goes on is shown as one.
    """
    if not run.trainer.wandb:
        return {}
    # Its banners; that a run is logged, and where, is told in one line by this project.
    os.environ.setdefault("WANDB_SILENT", "true")
    folder = Path(run.run_dir).absolute()
    project = _PROJECT if run.trainer.wandb is True else run.trainer.wandb
    return {
        "create_wandb_logger": True,
        "wandb_logger_kwargs": {
            "project": project,
            "name": f"{folder.parent.name}/{folder.name}",
            "id": on_rank_0(lambda: _kept_id(logs)),
            "resume": "allow",
            "save_dir": str(logs),
        },
    }


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


def keep_quiet(trainer: pl.Trainer) -> None:
    """Leave out an argument that Lightning gives to every run, unset, and which wandb warns has no effect."""
    for shown in trainer.loggers:
        if isinstance(shown, WandbLogger) and shown._wandb_init.get("anonymous") is None:
            shown._wandb_init.pop("anonymous", None)


def _kept_id(logs: Path) -> str:
    """The id that an earlier start has left, or a new one."""
    path = logs / _ID
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()
