"""TensorBoard, for a run that is worth more than its curves."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

logger = logging.getLogger(__name__)

# Seconds until a writer is tried again after one that failed: each leaves a file.
_RETRY = 60.0


class LastingTensorBoard(TensorBoardLogger):
    """Lightning's logger, but that a full disk costs points, not the run: ``metrics.jsonl`` has them all.

    A writer that failed is over, and may have left half a record. What comes later goes to a file of its own.
    """

    def __init__(self, **arguments: Any) -> None:
        """Args:
        arguments: Lightning's.
        """
        super().__init__(**arguments)
        self._again_at = -float("inf")

    @property
    def log_dir(self) -> str:
        """The folder as it was given: Lightning would take ``$HOME`` in its name for a variable."""
        return os.path.join(self.root_dir, "")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Draw points."""
        self._attempt(lambda: super(LastingTensorBoard, self).log_metrics(metrics, step))

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Keep them for ``save``."""
        self._attempt(lambda: super(LastingTensorBoard, self).log_hyperparams(*arguments, **named))

    def save(self) -> None:
        """Have what was drawn on the disk."""
        if self._attempt(lambda: super(LastingTensorBoard, self).save()):
            # What is drawn again is dropped by now; another writer would drop what this process has drawn.
            self._kwargs.pop("purge_step", None)

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._attempt(lambda: super(LastingTensorBoard, self).finalize(status))

    def _attempt(self, write: Callable[[], None]) -> bool:
        """Whether it was written."""
        if time.monotonic() < self._again_at:
            return False
        try:
            write()
        except (OSError, ValueError) as error:
            # Lightning takes whatever goes wrong for a value that cannot be drawn.
            failure = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(failure, OSError):
                raise
            if self._again_at < 0:
                logger.warning("%s: points are left out of TensorBoard, the job goes on: %s", self.log_dir, failure)
            self._experiment = None
            self._again_at = time.monotonic() + _RETRY
            return False
        self._again_at = -float("inf")
        return True
