"""A bound on how long somebody else's program may run."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class OutOfTimeError(Exception):
    """What was run did not end in time."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop Python code that runs for longer; in the main thread of a process, where signals are heard.

    In other threads nothing is bounded, and nowhere a single operation of the interpreter.

    Raises:
        OutOfTimeError: It ran for longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # A limit that somebody else has set goes on once this one is over.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, interval)
