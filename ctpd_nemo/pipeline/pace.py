"""How fast a run is: the time it has left, and a warning when its tokens/s fall by half."""

import datetime
import logging
import statistics
import time
from collections import deque
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

logger = logging.getLogger(__name__)

# Steps that stand for the present, and windows that stand for what is usual.
_RECENT, _USUAL = 20, 30
# So many windows make something usual.
_ENOUGH = 3
# Below this share of what is usual a run is slow; above that one it is not any more.
_SLOW, _RECOVERED = 0.5, 0.75


class Clock:
    """The time that is left, by how long the work done since ``start`` took."""

    def start(self, done: int) -> None:
        """Begin, with so much done before."""
        self.started = time.monotonic()
        self._done_before = done

    def time_left(self, done: int, total: int) -> datetime.timedelta | None:
        """What is left once ``done`` of ``total`` are; ``None`` before anything was done."""
        if done <= self._done_before:
            return None
        each = (time.monotonic() - self.started) / (done - self._done_before)
        return datetime.timedelta(seconds=round(each * (total - done)))


class Pace:
    """Tokens a second, over windows of steps.

    Attributes:
        last_window: Tokens a second of the last whole window; ``None`` before there was one.
    """

    def __init__(self, first: int = 5, steps: int = 5, seconds: float = 20.0) -> None:
        """Args:
        first: Steps that count for nothing: what is compiled, allocated and read for the first time is in them.
        steps: A window has at least so many,
        seconds: and takes at least so long.
        """
        self._first = first
        self._steps = steps
        self._seconds = seconds
        self._window: list[tuple[int, float]] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._rates: deque[float] = deque(maxlen=_USUAL)
        self._slow = False
        self.last_window: float | None = None

    @property
    def rate(self) -> float | None:
        """Tokens a second over the last steps; ``None`` before there were any."""
        return _rate(self._recent) if self._recent else None

    @property
    def usual(self) -> float | None:
        """The median of the recent windows that were not slow; ``None`` while there are too few."""
        return statistics.median(self._rates) if len(self._rates) >= _ENOUGH else None

    def add(self, tokens: int, seconds: float) -> Literal["fell", "recovered"] | None:
        """Count a step that nothing but training was part of; what became of the rate, where its window tells.

        A fall is told once, however long it lasts, and once more after the rate had recovered.
        """
        self._recent.append((tokens, seconds))
        if self._first:
            self._first -= 1
            return None
        self._window.append((tokens, seconds))
        if len(self._window) < self._steps or sum(step[1] for step in self._window) < self._seconds:
            return None
        rate, usual = _rate(self._window), self.usual
        self.last_window = rate
        self._window.clear()
        before = self._slow
        if usual is not None:
            self._slow = rate < (_RECOVERED if before else _SLOW) * usual
        if not self._slow:
            self._rates.append(rate)
        return None if self._slow == before else "fell" if self._slow else "recovered"


class PaceWatch(Callback):
    """Measures the time from the end of one step to the end of the next, waiting for data included; rank 0 warns."""

    def __init__(self, title: str) -> None:
        """Args:
        title: What its lines begin with.
        """
        self.title = title
        self.pace = Pace()
        self._last: float | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, unless a checkpoint or a validation lies between the step before and it."""
        now = time.monotonic()
        if self._last is not None:
            change = self.pace.add(pl_module.last_stats.tokens, now - self._last)
            if change and trainer.is_global_zero:
                self._tell(change, trainer.global_step)
        self._last = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the step out that is in between."""
        self._last = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Leave the step out that is in between."""
        self._last = None

    def _tell(self, change: str, step: int) -> None:
        rate, usual = self.pace.last_window, self.pace.usual
        if change == "fell":
            text = "%-13s step %d: tokens/s fell to %.0f, less than half of the usual %.0f"
            logger.warning(text, self.title, step, rate, usual)
        else:
            logger.info("%-13s step %d: %.0f tokens/s, as usual again (%.0f)", self.title, step, rate, usual)


def _rate(steps: Any) -> float:
    return sum(step[0] for step in steps) / max(1e-9, sum(step[1] for step in steps))
