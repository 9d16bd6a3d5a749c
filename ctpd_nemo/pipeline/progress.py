"""How far a job is, for a person: a bar on a terminal, lines in a log file."""

import logging
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ctpd_nemo.pipeline.pace import Clock

logger = logging.getLogger(__name__)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over the steps of the whole run, those before a resume included; a bar over shards when scoring.

    Lightning's own counts the steps that this process has to do. The time left goes by what this process has done.
    """

    def __init__(self, title: str, refresh_rate: int = 1) -> None:
        """Args:
        title: What the bar begins with.
        refresh_rate: Steps between two updates.
        """
        super().__init__(refresh_rate)
        self.title = title

    def init_train_tqdm(self) -> Tqdm:
        """The bar, as far as the run was when this process began."""
        return self._bar(self.title, total=self.trainer.max_steps, initial=self.trainer.global_step)

    def init_validation_tqdm(self) -> Tqdm:
        """A bar below, while it lasts."""
        return self._bar("validation", below=True)

    def init_predict_tqdm(self) -> Tqdm:
        """The bar of a pass over the shards."""
        return self._bar(f"{self.title}, shards of this replica")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Nothing begins anew with an epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the step."""
        step = trainer.global_step
        if self._should_update(step, trainer.max_steps):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set the length of the bar."""
        super().on_validation_batch_start(*args, **kwargs)
        self.val_progress_bar.set_description("validation")

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Set the length of the bar."""
        super().on_predict_batch_start(*args, **kwargs)
        self.predict_progress_bar.set_description(f"{self.title}, shards of this replica")

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """What the model shows; NeMo's loggers have no version to tell."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items

    def _bar(self, title: str, below: bool = False, total: int | None = None, initial: int = 0) -> Tqdm:
        return Tqdm(
            desc=title,
            total=total,
            initial=initial,
            position=2 * self.process_position + below,
            disable=self.is_disabled,
            leave=not below,
            dynamic_ncols=True,
            file=sys.stderr,
            # The time left goes by all that was done, and not by the last steps alone.
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )


class ProgressLines(Callback):
    """A line now and then, where there is no terminal to draw a bar on: the first step, the last, and some between."""

    def __init__(self, title: str, seconds: float = 10.0) -> None:
        """Args:
        title: What the lines begin with.
        seconds: At least so much time lies between two lines.
        """
        self.title = title
        self.seconds = seconds
        self._clock = Clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step where it is due."""
        step, total = trainer.global_step, trainer.max_steps
        if self._is_due(step, total):
            shown = "  ".join(f"{name} {pl_module.last_metrics[name]:.3f}" for name in pl_module.shown_metrics)
            rate = pl_module.last_metrics["tokens_per_second"]
            left = self._clock.time_left(step, total)
            logger.info("%-13s step %d of %d  %s  %.0f tokens/s  %s left", self.title, step, total, shown, rate, left)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start(0)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the shard where it is due; replicas have as many shards as the first, or one less."""
        done, total = batch_idx + 1, int(trainer.num_predict_batches[0])
        if self._is_due(done, total):
            left = self._clock.time_left(done, total)
            logger.info("%-13s shard %d of %d of this replica  %s left", self.title, done, total, left)

    def _start(self, step: int) -> None:
        self._clock.start(step)
        self._last = time.monotonic()
        self._first_step = step

    def _is_due(self, step: int, total: int) -> bool:
        now = time.monotonic()
        due = step in (self._first_step + 1, total) or now - self._last >= self.seconds
        if due:
            self._last = now
        return due
