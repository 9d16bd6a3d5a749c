"""Worker processes: started so that tokenizers bear it, and bad input in them told as it was."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch.utils.data import DataLoader

from ctpd_nemo.data.ahead import Ahead, WorkerContext
from ctpd_nemo.errors import InputError

T = TypeVar("T", covariant=True)


class WorkerTask(Protocol[T]):
    """Items by number, each made in a worker."""

    def prepare(self) -> None:
        """Build what forked workers can share; called once, in the process that starts them."""

    def __getitem__(self, number: int) -> T | InputError:
        """One item. An ``InputError`` is returned, and raised by the loader: what workers raise becomes text."""


class WorkerLoader(DataLoader[T]):
    """A ``DataLoader`` over a ``WorkerTask`` that raises an ``InputError`` of a worker as it was.

    Iteration that is broken off ends the workers, within seconds whatever they do. It raises ``WorkerDiedError`` where
    one of them has died.
    """

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        self.dataset.prepare()  # type: ignore[attr-defined]
        if not self.num_workers:
            yield from _raised(super().__iter__())
            return
        self.worker_init_fn = _leave_signals_to_the_job
        self.multiprocessing_context = context = WorkerContext()
        with _tokenizers_may_fork(), _children_end_unnoticed():
            ahead = Ahead(super().__iter__(), context.workers)
        try:
            yield from _raised(ahead)
        finally:
            ahead.close()


def _raised(items: Iterator[T | InputError]) -> Iterator[T]:
    for item in items:
        if isinstance(item, InputError):
            raise item
        yield item


def _leave_signals_to_the_job(worker: int) -> None:
    """Ctrl-C, and SIGTERM of some schedulers, reach every process; the job may have a step to do yet, on new data.

    SIGTERM of the job itself, which ends workers so when it ends, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=[os.getppid()], daemon=True).start()


def _end_when_told_by(job: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != job:
        pass
    os._exit(0)


@contextmanager
def _children_end_unnoticed() -> Iterator[None]:
    """Keep the handler of SIGCHLD that is there: torch's raises in the middle of whatever runs when a worker dies."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


@contextmanager
def _tokenizers_may_fork() -> Iterator[None]:
    """Keep tokenizers single-threaded in workers, which also keeps them from warning about it in each.

    The library reads this variable when a process forks, and has no other switch. Each worker keeps the value it is
    forked with, one thread a worker; here it is put back.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
