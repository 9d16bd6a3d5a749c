"""What becomes of a run folder while a job is at work in it: somebody may move or remove it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.origin import CONFIG, restore_record
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.stopping import request_stop

logger = logging.getLogger(__name__)

# A folder of a network may be out of sight for a moment.
_LOOKS, _BETWEEN_SECONDS = 3, 0.5


class FolderWatch(Callback):
    """Ends training where its run folder is gone, and writes its record anew where that alone is.

    Checkpoints that went on would make the folder anew, without what it began with and what came before: a run that
    looks whole and is not. What was moved away can be gone on from where it is now.
    """

    def __init__(self, folder: Path, write: Callable[[pl.Trainer], dict[str, Any]]) -> None:
        """Args:
        folder: The run folder.
        write: Writes the record of this start, see ``origin.write_record``; called by rank 0.
        """
        # The job may be the working folder's; a relative name is to mean the same one later.
        self.folder = folder.absolute()
        self._write = write
        self._start: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the record."""
        if trainer.is_global_zero:
            self._start = self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look; a job whose folder is gone is to stop with the checkpoint that it would write now."""
        if trainer.is_global_zero and self._is_gone():
            request_stop()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look before a checkpoint makes folders; every rank calls it together.

        Raises:
            InputError: The folder is gone.
        """
        self._stop_if_gone(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look before the last files are written; every rank calls it together.

        Raises:
            InputError: The folder is gone.
        """
        self._stop_if_gone(trainer)

    def _stop_if_gone(self, trainer: pl.Trainer) -> None:
        if on_rank_0(self._is_gone):
            found = f"no folder any more, at step {trainer.global_step}: removed or moved while a job was at work in it"
            expected = "it to stay until the job ends; where it was moved, run_dir=THERE goes on from its checkpoints"
            raise InputError(str(self.folder), found, expected)

    def _is_gone(self) -> bool:
        """Whether the folder is; on the way, restore what is missing in one that is there."""
        for _ in range(_LOOKS):
            if _is_there(self.folder / CONFIG):
                return False
            if _is_there(self.folder):
                self._restore()
                return False
            time.sleep(_BETWEEN_SECONDS)
        return True

    def _restore(self) -> None:
        try:
            restore_record(self.folder, self._start)
        except OSError as error:
            logger.warning("%s: the job's record is gone, and cannot be written anew: %s", self.folder, error)
        else:
            logger.warning("%s: the job's record was gone, and is written anew", self.folder)


def _is_there(path: Path) -> bool:
    """Whether it is, or nobody can tell: what an overloaded server says is no sign that it is gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
