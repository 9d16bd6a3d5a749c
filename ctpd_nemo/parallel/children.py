"""Processes that a job starts, and that are not to outlive it."""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator

_LOOK_SECONDS = 1.0


def end_with_parent() -> None:
    """Called in a process that ``multiprocessing`` started: end it as soon as its parent is gone, killed or not."""
    start_deaf(threading.Thread(target=_watch, args=[os.getppid()], daemon=True))


def start_deaf(thread: threading.Thread) -> None:
    """Start a thread that no signal is given to: each is for those that wait for it, or that it is to wake."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def children_end_too() -> Iterator[None]:
    """Have each process that this one forks meanwhile through ``multiprocessing`` end as soon as this one is gone.

    For forks of libraries, into which no call of ``end_with_parent`` can be put.
    """
    # Registered for as long as it is referred to.
    registered = _Registered()
    multiprocessing.util.register_after_fork(registered, lambda _: end_with_parent())
    try:
        yield
    finally:
        del registered


class _Registered:
    pass


def _watch(started_by: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Forks that came later hold the other end of the pipe that tells of the parent's end, until they end themselves.
    while parent.is_alive() and os.getppid() == started_by:
        parent.join(_LOOK_SECONDS)
    os._exit(1)
