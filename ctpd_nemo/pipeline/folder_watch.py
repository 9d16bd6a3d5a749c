"""What becomes of the folders of a job while it is at work in them: somebody may move or remove one."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.agreement import any_rank_of_replica
from ctpd_nemo.pipeline.origin import CONFIG, restore_record
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.stopping import request_stop

logger = logging.getLogger(__name__)

# A folder of a network may be out of sight for a moment.
_LOOKS, _BETWEEN_SECONDS = 3, 0.5


class KeptFolder:
    """A folder that has to stay while a job is at work in it.

    What went on to be written would make half of it anew, or be lost. What was moved away can be gone on from.
    """

    def __init__(
        self, key: str, folder: Path, left: str, mark: str, what: str, restore: Callable[[], None] | None
    ) -> None:
        """Args:
        key: The config key that names the folder.
        folder: It.
        left: What of it a job goes on from, behind "goes on".
        mark: A file in it, without which it is not what it was.
        what: What that file is.
        restore: Writes it anew where it alone is gone; ``None`` leaves that to another rank.
        """
        # The job may be the working folder's; a relative name is to mean the same one later.
        self.folder = folder.absolute()
        self._key, self._left, self._mark, self._what, self._restore = key, left, mark, what, restore

    def is_gone(self) -> bool:
        """Whether it is; on the way, restore what is missing in one that is there."""
        for look in range(_LOOKS):
            time.sleep(_BETWEEN_SECONDS if look else 0.0)
            if _is_there(self.folder / self._mark):
                return False
            if _is_there(self.folder):
                if self._restore is not None:
                    self._write_anew(self._restore)
                return False
        return True

    def error(self, at: str) -> InputError:
        """What a job ends with that finds it gone."""
        found = f"no folder any more, at {at}: removed or moved while a job was at work in it"
        expected = f"it to stay until the job ends; where it was moved, {self._key}=THERE goes on{self._left}"
        return InputError(str(self.folder), found, expected)

    def _write_anew(self, restore: Callable[[], None]) -> None:
        try:
            restore()
        except OSError as error:
            logger.warning("%s: %s is gone, and cannot be written anew: %s", self.folder, self._what, error)
        else:
            logger.warning("%s: %s was gone, and is written anew", self.folder, self._what)


def kept_run_folder(folder: Path, left: str, start: Callable[[], dict[str, Any]] | None) -> KeptFolder:
    """A run folder, with the record of the job that is at work in it.

    Args:
        folder: It.
        left: What of it a job goes on from, behind "goes on".
        start: Gives what ``origin.write_record`` has returned; ``None`` on other ranks than the first.
    """
    there = folder.absolute()
    restore = None if start is None else lambda: restore_record(there, start())
    return KeptFolder("run_dir", there, left, CONFIG, "the job's record", restore)


class FolderWatch(Callback):
    """Ends training where its run folder is gone, and writes its record anew where that alone is.

    Checkpoints that went on would make the folder anew, without what it began with and what came before: a run that
    looks whole and is not.
    """

    def __init__(self, folder: Path, write: Callable[[pl.Trainer], dict[str, Any]]) -> None:
        """Args:
        folder: The run folder.
        write: Writes the record of this start, see ``origin.write_record``; called by rank 0.
        """
        self._start: dict[str, Any] = {}
        self._kept = kept_run_folder(folder, " from its checkpoints", lambda: self._start)
        self._write = write

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the record."""
        if trainer.is_global_zero:
            self._start = self._write(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look; a job whose folder is gone is to stop with the checkpoint that it would write now."""
        if trainer.is_global_zero and self._kept.is_gone():
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
        if on_rank_0(self._kept.is_gone):
            raise self._kept.error(f"step {trainer.global_step}")


class ScoringWatch(Callback):
    """Ends scoring where its run folder or its cache is gone: replicas one by one, each at a shard of its own."""

    def __init__(self, kept: Sequence[KeptFolder]) -> None:
        """Args:
        kept: The folders.
        """
        self._kept = kept
        self._gone: set[Path] = set()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Leave a shard unwritten whose folder is gone: all ranks of a replica end together, behind it."""
        try:
            yield
        except FileNotFoundError:
            if not self._sees_gone():
                raise

    def _sees_gone(self) -> bool:
        """Whether a folder is gone, or was when this rank looked before."""
        self._gone |= {one.folder for one in self._kept if one.folder not in self._gone and one.is_gone()}
        return bool(self._gone)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look once models are read, which may take long.

        Raises:
            InputError: A folder is gone.
        """
        self._look("the first shard")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look; the ranks of one replica come to the same end.

        Raises:
            InputError: A folder is gone.
        """
        self._look(f"shard {batch.step}")

    def _look(self, at: str) -> None:
        self._sees_gone()
        for one in self._kept:
            if any_rank_of_replica(one.folder in self._gone):
                raise one.error(at)


def _is_there(path: Path) -> bool:
    """Whether it is, or nobody can tell: what an overloaded server says is no sign that it is gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
