"""What happens beside the training loop: checkpoints, the metric log, the report on the data."""

import datetime
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.data.loader import StepStats
from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint import find_checkpoints

logger = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Writes a checkpoint every so many steps and at the end, and keeps the newest."""

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        """Args:
        folder: Holds ``step-00000100`` and so on.
        every: Steps between two checkpoints; 0 for the end only.
        keep: How many stay.
        """
        self.folder = folder
        self.every = every
        self.keep = keep

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where the step is due."""
        step = trainer.global_step
        if step == trainer.max_steps or (self.every and step % self.every == 0):
            trainer.save_checkpoint(self.folder / f"step-{step:08d}")
            for old in find_checkpoints(self.folder)[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)


class ProgressLines(Callback):
    """A line of metrics now and then, where there is no terminal to draw a bar on."""

    def __init__(self, title: str, lines: int = 5) -> None:
        """Args:
        title: What the lines begin with.
        lines: How many there are over the whole run.
        """
        self.title = title
        self.lines = lines

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step where it is due."""
        step, total = trainer.global_step, trainer.max_steps
        if step % max(1, total // self.lines) and step != total:
            return
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        shown = "  ".join(f"{name} {pl_module.last_metrics[name]:.3f}" for name in pl_module.shown_metrics)
        left = datetime.timedelta(seconds=round(per_step * (total - step)))
        rate = pl_module.last_metrics["tokens_per_second"]
        logger.info("%-13s step %d of %d  %s  %.0f tokens/s  %s left", self.title, step, total, shown, rate, left)


class DataReport(Callback):
    """Says at the end what was trained on and what was left out, earlier parts of a resumed run included."""

    def __init__(self, title: str, place: str) -> None:
        """Args:
        title: What the line begins with.
        place: The training data, to name in an error.
        """
        self.title = title
        self.place = place
        self.stats = StepStats()

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {**vars(self.stats), "skipped": dict(self.stats.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.stats = StepStats(**{**state_dict, "skipped": Counter(state_dict["skipped"])})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step.

        Raises:
            InputError: Every pair of the run was skipped; it is raised before the last checkpoint is written.
        """
        self.stats += pl_module.last_stats
        if trainer.global_step == trainer.max_steps and not self.stats.pairs:
            raise InputError(self.place, str(self.stats), "pairs that can be trained on")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Report."""
        logger.info("%-13s trained on %s", self.title, self.stats)


class MetricLog(Callback):
    """Appends one JSON object a step to a file; rank 0 writes.

    A run that goes on from an earlier step drops the rows of steps it does again.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: The JSON-lines file.
        """
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Cut the log back to the steps that are done."""
        if trainer.is_global_zero and self.path.exists():
            rows = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line)["step"] <= trainer.global_step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Append the step's metrics."""
        self._append(trainer, {"step": trainer.global_step, **pl_module.last_metrics})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Append the means over the held-out pairs."""
        self._append(trainer, {"step": trainer.global_step, **pl_module.last_validation})

    def _append(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
