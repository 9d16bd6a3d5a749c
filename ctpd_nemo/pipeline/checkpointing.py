"""When checkpoints are written, which of them stay, and what becomes of a run that cannot write one."""

import functools
import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.base import LEFT_OUT
from ctpd_nemo.models.config import TrainerConfig
from ctpd_nemo.parallel import checkpoint_files as files
from ctpd_nemo.parallel.agreement import any_rank
from ctpd_nemo.parallel.checkpoint_writer import SaveFailed
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.stopping import Stopped, StopRequest, stopped

logger = logging.getLogger(__name__)

_VALIDATION = "validation.json"


class Checkpointing(Callback):
    """Writes a checkpoint every so many steps, at the end, and when asked to stop; keeps the newest and the best.

    Attributes:
        failure: Why the last checkpoint could not be written; ``None`` where it was.
    """

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        """Args:
        folder: Holds ``step-00000100`` and so on.
        config: How often, and how many stay.
        """
        self.folder = folder
        self.config = config
        self.failure: str | None = None
        self._begun_at = 0
        self._late = False
        self._stop = StopRequest()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Remove what a process that was killed had no time to, even where no step is left to be done."""
        if trainer.is_global_zero:
            self._tidy(_read_values(self.folder))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Listen for SIGTERM and Ctrl-C.

        Raises:
            InputError: Validations will have no such metric as checkpoints are compared by.
        """
        known = [f"val_{name}" for name in (*pl_module.metric_names, *LEFT_OUT)]
        if self.config.keep_best and self.config.best_by not in known:
            raise InputError("trainer.best_by", repr(self.config.best_by), f"one of {', '.join(known)}")
        self._begun_at = trainer.global_step
        self._stop.listen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where the step is due, or where it is the last for now.

        One that is due at a bad step waits for the next that changes weights: those from before stay, as many as are
        kept.

        Raises:
            Stopped: The job was asked to stop, and its checkpoint is written.
        """
        step = trainer.global_step
        if step == trainer.max_steps:
            return
        self._finish(trainer, wait=False)
        stop = any_rank(self._stop.received)
        self._late |= self._is_due(step)
        if stop or (self._late and not pl_module.bad_steps.in_a_row):
            self._late = False
            self._save(trainer)
        if stop:
            self._finish(trainer, wait=True)
            self._end(step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write down how good this step is."""
        if self.config.keep_best:
            value = pl_module.last_validation[self.config.best_by]
            # A NaN is no better and no worse than anything, and JSON has no word for it.
            if trainer.is_global_zero and math.isfinite(value):
                values = _read_values(self.folder) | {_name(trainer.global_step): value}
                self._tidy(values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the last step, validated by now, and see to it that nothing is left to be written.

        Raises:
            Stopped: The job was asked to stop in its last step, and is not to begin anything else.
        """
        if trainer.global_step == trainer.max_steps > self._begun_at:
            self._save(trainer)
        self._finish(trainer, wait=True)
        if any_rank(self._stop.received):
            self._end(trainer.global_step)

    def _is_due(self, step: int) -> bool:
        every, validated = self.config.checkpoint_every, self.config.validate_every
        return bool((every and step % every == 0) or (self.config.keep_best and validated and step % validated == 0))

    def _save(self, trainer: pl.Trainer) -> None:
        self._finish(trainer, wait=True)
        try:
            trainer.save_checkpoint(self.folder / _name(trainer.global_step))
        except SaveFailed as error:
            self._failed(trainer, error)
        else:
            if not self.config.async_save:
                self._whole(trainer)

    def _finish(self, trainer: pl.Trainer, wait: bool) -> None:
        try:
            done = trainer.strategy.writer.finish(wait)  # type: ignore[attr-defined]
        except SaveFailed as error:
            self._failed(trainer, error)
        else:
            if done is not None:
                self._whole(trainer)

    def _whole(self, trainer: pl.Trainer) -> None:
        self.failure = None
        if trainer.is_global_zero:
            self._tidy(_read_values(self.folder))

    def _failed(self, trainer: pl.Trainer, error: SaveFailed) -> None:
        self.failure = str(error)
        trainer.lightning_module.failed_checkpoints += 1  # type: ignore[operator,assignment]
        logger.warning(
            "%s: a checkpoint could not be written, as of step %d; training goes on, older ones stay: %s",
            self.folder,
            trainer.global_step,
            error,
        )

    def _tidy(self, values: dict[str, float]) -> None:
        """Remove what is neither among the newest nor among the best; rank 0 does it."""
        whole = [path.name for path in files.find_checkpoints(self.folder)]
        sign = 1.0 if self.config.best_by.endswith("loss") else -1.0
        best = sorted((name for name in whole if name in values), key=lambda name: (sign * values[name], name))
        stay = {*whole[-self.config.keep_last :], *best[: self.config.keep_best]}
        try:
            for name in whole:
                if name not in stay:
                    files.remove(self.folder / name)
            if values:
                # The last step is validated before its checkpoint is there.
                newest = max(whole, default="")
                kept = {name: value for name, value in values.items() if name in stay or name > newest}
                self.folder.mkdir(parents=True, exist_ok=True)
                files.write_whole(self.folder / _VALIDATION, json.dumps(kept, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s: not tidied up: %s", self.folder, error)

    def _end(self, step: int) -> None:
        """Leave; with a status of failure where something is lost. Every rank calls it together."""
        interrupted = any_rank(self._stop.interrupted)
        if self.failure is not None:
            message = stopped(f"at step {step}, without its checkpoint: {self.failure}", interrupted).message
            raise Stopped(message, status=1)
        raise stopped(f"at step {step}, with a checkpoint of it", interrupted)


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is as it was written, every byte of it; ``None`` where there is none at all.

    Every rank calls it together and reads a share of the files. A damaged one is told, loses its name, and gives way
    to the one before. ``latest`` names the one that is found.

    Raises:
        InputError: There are checkpoints, and none of them is whole.
    """
    named = on_rank_0(lambda: _named(checkpoints))
    for folder in reversed(named):
        damage = find_damage_together(folder)
        if damage is None:
            on_rank_0(functools.partial(files.point_to_latest, folder))
            return folder
        aside = on_rank_0(functools.partial(files.set_aside, folder))
        logger.warning("a damaged checkpoint, now in %s: %s", aside, damage)
    if named:
        expected = "a whole one; remove them, or give another run_dir, to begin anew"
        raise InputError(str(checkpoints), f"{len(named)} damaged checkpoints", expected)
    return None


def find_damage_together(checkpoint: Path) -> InputError | None:
    """What is wrong with a checkpoint, on every rank; each reads a share of its files, and all call it together."""
    ranks = dist.get_world_size()
    found: list[InputError | None] = [None] * ranks
    dist.all_gather_object(found, files.find_damage(checkpoint, part=dist.get_rank(), parts=ranks))
    return next((damage for damage in found if damage is not None), None)


def _named(checkpoints: Path) -> list[Path]:
    """What has the name of a checkpoint, once what was left half done is cleared away."""
    files.clean(checkpoints)
    return files.named_checkpoints(checkpoints)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read_values(folder: Path) -> dict[str, float]:
    """What checkpoints were worth when they were validated, by name."""
    path = folder / _VALIDATION
    if not path.exists():
        return {}
    try:
        return {name: float(value) for name, value in read_object(path).items()}
    except (ValueError, TypeError, OverflowError) as error:
        logger.warning("%s: cannot be read, earlier checkpoints are not compared: %s", path, error)
        return {}
