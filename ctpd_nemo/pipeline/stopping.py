"""SIGTERM: a scheduler that wants its nodes back, or a person who wants theirs."""

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """The job was asked to stop and has; started again, it goes on from here. The process ends with status 0."""

    def __init__(self, message: str = "stopped by SIGTERM", status: int = 0) -> None:
        super().__init__(status)
        self.message = message


def stop_at_once(status: int) -> None:
    """Until a job listens for itself, SIGTERM ends it where it is: nothing that is half done has its name yet.

    Args:
        status: What the process ends with.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(status=status)

    _handle(stop)


class StopRequest:
    """Remembers SIGTERM until the job comes to a point that it can go on from."""

    def __init__(self) -> None:
        self.received = False

    def listen(self) -> None:
        """Begin; Lightning gives the signal back to whoever had it when its trainer is done."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.received = True

        _handle(remember)


def _handle(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
