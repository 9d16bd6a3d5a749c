"""Worker processes: started so that tokenizers bear it, and bad input in them told as it was."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader

from ctpd_nemo.errors import InputError

T = TypeVar("T", covariant=True)


class WorkerTask(Protocol[T]):
    """Items by number, each made in a worker."""

    def prepare(self) -> None:
        """Build what forked workers can share; called once, in the process that starts them."""

    def __getitem__(self, number: int) -> T | InputError:
        """One item. An ``InputError`` is returned, and raised by the loader: what workers raise becomes text."""


class WorkerLoader(DataLoader[T]):
    """A ``DataLoader`` over a ``WorkerTask`` that raises an ``InputError`` of a worker as it was."""

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        self.dataset.prepare()  # type: ignore[attr-defined]
        self.worker_init_fn = _leave_signals_to_the_job
        with _tokenizers_may_fork():
            items: Iterator[T | InputError] = super().__iter__()
        if self.num_workers:
            items = _ahead(items)
        error = None
        for item in items:
            if isinstance(item, InputError):
                error = item
                break
            yield item
        # Ends the workers now. Held by the error's traceback, they would wait seconds for the garbage collector.
        del items
        if error is not None:
            raise error


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


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Take each item from the workers while the one before it is in use, as that takes milliseconds."""
    with ThreadPoolExecutor(1, "data") as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


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
