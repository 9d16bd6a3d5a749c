"""Checkpoints written while the run waits, or while it goes on; a save that fails is no end of the run.

Megatron-Core's asynchronous save is used for both: what is to be written is the same, bit for bit. It copies the state
in a process of its own (a fork), and every rank finishes what all ranks have written.

Some files are written by the first rank alone, and an exception there would leave the others waiting for it. It is kept
until all ranks meet. That takes functions of Megatron-Core, 0.16.1 to 0.19.2, which are wrapped here.
"""

import contextlib
import functools
import inspect
import multiprocessing
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, common, filesystem_async, fully_parallel
from torch.distributed.checkpoint.api import CheckpointException

from ctpd_nemo.parallel import checkpoint_files as files
from ctpd_nemo.parallel.agreement import first_reason
from ctpd_nemo.parallel.children import children_end_too, end_with_parent
from ctpd_nemo.parallel.optimizer_state import SHARDING

# What went wrong on this rank since the last save began.
_kept: list[str] = []


class SaveFailed(Exception):
    """A checkpoint that could not be written, for instance as the disk is full: raised on every rank, with the reason.

    Nothing of it is left, and older checkpoints are as they were.
    """


class CheckpointWriter:
    """Writes checkpoints one after the other; every rank calls its methods together."""

    def __init__(self, in_background: bool = False) -> None:
        """Args:
        in_background: ``save`` returns when the state is copied, and ``finish`` gives the checkpoint its name.
        """
        self._queue = async_utils.AsyncCallsQueue() if in_background else None
        self._pending: tuple[Path, Path] | None = None

    def save(self, folder: str | Path, make_state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint, or begin to.

        Args:
            folder: The final name; an existing folder of that name is replaced once the new one is whole.
            make_state: Makes Megatron-Core's sharded state.

        Raises:
            SaveFailed: This checkpoint could not be written, or one that was being written.
        """
        self.finish(wait=True)
        final, self._pending = Path(folder), None
        _kept.clear()
        writing = _begin(final)
        with self._failing(writing):
            state = make_state()
            # Megatron-Core has the first rank look into the folder, alone; the others would wait for its error.
            if reason := first_reason(f"{writing} is gone" if dist.get_rank() == 0 and not writing.is_dir() else None):
                raise SaveFailed(reason)
            request = _request(state, writing, in_background=self._queue is not None)
            request.finalize_fns.append(functools.partial(_complete, writing, final))
            if self._queue is None:
                request.execute_sync()
            else:
                self._queue.schedule_async_request(request)
                self._pending = final, writing

    def finish(self, wait: bool) -> Path | None:
        """Give the checkpoint that is being written its name, once all ranks have written their part of it.

        Args:
            wait: Until they have; otherwise only where they have already.

        Returns:
            The checkpoint that became whole by this call.

        Raises:
            SaveFailed: It could not be written.
        """
        if self._queue is None or self._pending is None:
            return None
        final, writing = self._pending
        with self._failing(writing):
            if not self._queue.maybe_finalize_async_calls(blocking=wait):
                return None
        self._pending = None
        return final

    @contextlib.contextmanager
    def _failing(self, writing: Path) -> Iterator[None]:
        """Clear away what there is of a checkpoint that failed."""
        try:
            yield
        # That of torch's checkpoints is no ``Exception``; only the first rank's has the details.
        except (SaveFailed, CheckpointException) as error:
            self._pending = None
            reason = None
            if dist.get_rank() == 0:
                causes = [str(failure[0]) for failure in getattr(error, "failures", {}).values()]
                room = _room(writing.parent)
                shutil.rmtree(writing, ignore_errors=True)
                reason = f"{' '.join((causes or [str(error)])[0].split())} ({room})"
            raise SaveFailed(first_reason(reason)) from error


def _begin(final: Path) -> Path:
    """Make the folder that a checkpoint is written in, under a name that every rank knows."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        writing = files.being_written(final, secrets.token_hex(4))
        try:
            writing.mkdir(parents=True)
            told = [writing, None]
        except OSError as error:
            told = [None, str(error)]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise SaveFailed(told[1])
    return told[0]


def _room(folder: Path) -> str:
    """What there is on the disk of a folder, which may be gone with its disk."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free on its disk"
    except OSError as error:
        return f"its disk cannot be looked at: {error}"


def _request(state: dict[str, Any], writing: Path, in_background: bool) -> async_utils.AsyncRequest:
    """What is to be written, as Megatron-Core plans it; 0.19 has several ways of its own to write it."""
    # Its writer hands results over through a queue in a process of its own, which it spawns and which imports
    # everything again.
    filesystem_async._results_queue = _ResultsOfFork() if in_background else queue.Queue()
    parameters = inspect.signature(dist_checkpointing.save).parameters
    way = {"async_strategy": "mcore"} if "async_strategy" in parameters else {}
    # What data-parallel replicas hold alike, each writes and sums a share of.
    strategy = fully_parallel.FullyParallelSaveStrategyWrapper(
        serialization.get_default_save_sharded_strategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    request = dist_checkpointing.save(
        state, str(writing), strategy, async_sharded_save=True, content_metadata=SHARDING, **way
    )
    assert request is not None
    if request.async_fn is None:
        return request
    return request._replace(async_fn=functools.partial(_write, request.async_fn, writing, in_background))


def _write(write: Callable[..., None], writing: Path, in_fork: bool, rank: int, *args: Any) -> None:
    """Write this rank's files, and their sums while they are still in memory."""
    # Forks hold the rank's connections: others would not see that a rank was killed of which one lives on.
    if in_fork:
        end_with_parent()
    try:
        # Until 0.18 Megatron-Core forks once more, for each file; the last such process tells the one that started
        # it, and would wait for ever for one that is gone to hear it.
        with children_end_too():
            write(rank, *args)
        files.write_sums(writing, rank)
    except OSError as error:
        _kept.append(str(error))


def _complete(writing: Path, final: Path) -> None:
    """Make a checkpoint of a folder that all ranks have written to."""
    reason = first_reason(_kept[0] if _kept else None)
    if reason is None:
        try:
            if dist.get_rank() == 0:
                files.write_manifest(writing)
                files.give_name(writing, final)
        except OSError as error:
            _kept.append(str(error))
        reason = first_reason(_kept[0] if _kept else None)
    if reason is not None:
        raise SaveFailed(reason)
    if dist.get_rank() == 0:
        files.point_to_latest(final)


class _ResultsOfFork:
    """A queue for one result of a forked process, with as much of ``multiprocessing.Queue`` as Megatron-Core uses.

    A thread takes the result as it comes: a pipe holds no large one, and its writer would wait to be read before it
    ends, while it is waited for to end before it is read.
    """

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)
        self._received: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def put(self, result: Any) -> None:
        self._writer.send(result)

    def get_nowait(self) -> Any:
        """The result of a process that has ended; ``queue.Empty`` where it was killed before it had one."""
        self._writer.close()
        self._thread.join(10)
        return self._received.get_nowait()

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._received.put(self._reader.recv())


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what goes wrong on the first rank until all ranks meet."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        # torch's own writer of files raises the latter.
        except (OSError, RuntimeError) as error:
            _kept.append(" ".join(str(error).split()))

    return call


serialization.save_config = _keeping(serialization.save_config)
filesystem_async.FileSystemWriterAsync.finish = _keeping(filesystem_async.FileSystemWriterAsync.finish)  # type: ignore[method-assign]
if hasattr(common, "TorchCommonSaveStrategy"):  # until 0.18; later versions write no such file
    common.TorchCommonSaveStrategy.save_common = _keeping(common.TorchCommonSaveStrategy.save_common)  # type: ignore[method-assign]
