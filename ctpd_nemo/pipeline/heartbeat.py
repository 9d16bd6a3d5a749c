"""A small file that says how a job is, for a scheduler or a person to read while it runs.

``heartbeat.json`` in the run folder is replaced as a whole, so a reader never sees half of one. A job is alive while
``time`` is not older than ``stale_after_seconds``, and its state none of "finished", "stopped" and "failed".
"""

import datetime
import json
import logging
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state

from ctpd_nemo.parallel.checkpoint_files import LATEST
from ctpd_nemo.pipeline.pace import Clock, Pace
from ctpd_nemo.pipeline.stopping import INTERRUPTED, TERMINATED, Stopped

logger = logging.getLogger(__name__)

FILE = "heartbeat.json"
_ENDS = ("finished", "stopped", "failed")
# Seconds between two writes of the same state.
_EVERY = 1.0
# A step may take so many times as long as the longest so far before it is taken for dead.
_PATIENCE, _LEAST_PATIENCE = 10, 60.0


class Heartbeat(Callback):
    """Writes the heartbeat of a training or scoring job; rank 0 does it."""

    def __init__(self, folder: Path, timeout_minutes: float, pace: Pace | None = None) -> None:
        """Args:
        folder: The run folder, with its ``checkpoints`` where it has some.
        timeout_minutes: After so long a collective that does not return ends the job.
        pace: What tokens/s of training are read from.
        """
        self.path = folder / FILE
        self.pace = pace
        self._timeout = timeout_minutes * 60.0
        self._clock = Clock()
        self._begun = _now()
        self._state = ""
        self._progress: dict[str, Any] = {}
        self._left: datetime.timedelta | None = None
        self._rate: float | None = None
        self._longest = 0.0
        self._moved = self._written = -float("inf")
        self._failed = False

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin."""
        self._start("training", trainer.global_step)
        self._beat(trainer, "training", self._steps(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Training goes on after a checkpoint or a validation."""
        if self._state != "training":
            self._moved = time.monotonic()
            self._beat(trainer, "training", self._progress)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell of the step."""
        self._left = self._clock.time_left(trainer.global_step, trainer.max_steps)
        self._move()
        self._beat(trainer, "training", self._steps(trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Tell of the validation."""
        self._beat(trainer, "validating", self._progress)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Tell that it goes on."""
        self._beat(trainer, "validating", self._progress)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Tell of the checkpoint."""
        self._beat(trainer, "saving", self._progress)

    # Scoring

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin a pass over the data."""
        self._start("scoring", 0)
        self._beat(trainer, "scoring", self._shards(trainer, 0))

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell of the shard."""
        # Replicas have equal shares.
        tokens = pl_module.stats.tokens * parallel_state.get_data_parallel_world_size()
        self._rate = tokens / max(1e-9, time.monotonic() - self._clock.started)
        shards = self._shards(trainer, batch_idx + 1)
        self._left = self._clock.time_left(shards["shards_done"], shards["shards"])
        self._move()
        self._beat(trainer, "scoring", shards)

    # The end

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Tell why the job ends."""
        stopped = isinstance(exception, Stopped) and exception.code in (0, INTERRUPTED, TERMINATED)
        stopped |= isinstance(exception, KeyboardInterrupt)
        if trainer.is_global_zero:
            why = {} if stopped else {"error": f"{type(exception).__name__}: {exception}"[:1000]}
            self.end("stopped" if stopped else "failed", **why)

    def end(self, state: str, **more: Any) -> None:
        """Write the last one, of a job that is "finished", "stopped" or "failed"; for rank 0."""
        self._state, self._left = state, None
        self._write({**self._progress, **more})

    def _start(self, state: str, done: int) -> None:
        self._clock.start(done)
        self._left, self._longest, self._moved = None, 0.0, time.monotonic()

    def _move(self) -> None:
        """A step or shard is done: how long they take says for how long it is no bad sign that nothing happens."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._moved)
        self._moved = now

    def _beat(self, trainer: pl.Trainer, state: str, progress: dict[str, Any]) -> None:
        self._progress = progress
        if not trainer.is_global_zero:
            self._state = state
        elif state != self._state or time.monotonic() - self._written >= _EVERY:
            self._state = state
            self._write(progress)

    @staticmethod
    def _steps(trainer: pl.Trainer) -> dict[str, Any]:
        return {"step": trainer.global_step, "steps": trainer.max_steps}

    @staticmethod
    def _shards(trainer: pl.Trainer, done: int) -> dict[str, Any]:
        """Of the first replica; the others have as many, or one less."""
        return {"shards_done": done, "shards": int(trainer.num_predict_batches[0])}

    def _write(self, progress: dict[str, Any]) -> None:
        self._written = time.monotonic()
        rate = self.pace.rate if self.pace else self._rate
        beat = {
            "time": _now(),
            "state": self._state,
            **progress,
            "seconds_left": None if self._left is None else self._left.total_seconds(),
            "tokens_per_second": None if rate is None else round(rate, 1),
            "memory_peak_bytes": _peak_bytes(),
            "last_checkpoint": self._last_checkpoint(),
            "stale_after_seconds": self._patience(),
            "started": self._begun,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        writing = self.path.with_name(f".{FILE}.writing")
        try:
            writing.write_text(json.dumps(beat, indent=2) + "\n", encoding="utf-8")
            os.replace(writing, self.path)
            self._failed = False
        except OSError as error:
            if not self._failed:
                goes_on = "" if self._state in _ENDS else ", the job goes on"
                logger.warning("%s: not written%s: %s", self.path, goes_on, error)
            self._failed = True

    def _patience(self) -> float:
        """Checkpoints, validations and first steps take what they take, but no collective longer than its limit."""
        if self._state in ("training", "scoring") and self._longest:
            return round(min(self._timeout, max(_LEAST_PATIENCE, _PATIENCE * self._longest)), 1)
        return self._timeout

    def _last_checkpoint(self) -> str | None:
        """Its folder, as ``checkpoints/latest`` names it when it is whole."""
        latest = self.path.parent / "checkpoints" / LATEST
        try:
            return str(latest.parent / latest.read_text(encoding="utf-8", errors="replace").strip())
        except OSError:
            return None


def _peak_bytes() -> int:
    """The most memory that this process has held: of its GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
