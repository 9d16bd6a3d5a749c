"""SIGTERM and Ctrl-C: a scheduler that wants its nodes back, or a person who wants theirs."""

import os
import signal
import threading
import weakref
from types import FrameType
from typing import Any

# What a shell expects of a command that Ctrl-C has ended, and begins no next one after; and of one that SIGTERM has.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Stopped(SystemExit):
    """The job was asked to stop and has; started again, it goes on from here.

    The process ends with status 0 after SIGTERM, with 143 where the job has more nodes, and with 130 after Ctrl-C.
    """

    def __init__(self, message: str = "stopped by SIGTERM", status: int = 0) -> None:
        super().__init__(status)
        self.message = message


def stopped(where: str, interrupted: bool) -> Stopped:
    """The end of a job that has come to a point that it can go on from."""
    if interrupted:
        return Stopped(f"stopped by Ctrl-C {where}", INTERRUPTED)
    # All nodes stop where one is told to. The torchrun of another, which was told nothing, would take 0 for done, and
    # so would whoever is to start its part again.
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return Stopped(f"stopped by SIGTERM {where}", 0 if alone else TERMINATED)


def stop_at_once(status: int) -> None:
    """Until a job listens for itself, either ends it where it is: nothing that is half done has its name yet.

    Args:
        status: What the process ends with after SIGTERM.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise Stopped("stopped by Ctrl-C", INTERRUPTED)
        raise Stopped(status=status)

    _handle(stop)


# What listens for signals now, or has.
_listening: "weakref.WeakSet[StopRequest]" = weakref.WeakSet()


def request_stop() -> None:
    """Have this job stop, on all ranks, at the next point that it can go on from, as if it had been asked to."""
    for request in _listening:
        request.received = True


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the job comes to a point that it can go on from; a second Ctrl-C ends it.

    Attributes:
        received: Whether there was either, or ``request_stop``.
        interrupted: Whether there was Ctrl-C.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False

    def listen(self) -> None:
        """Begin; Lightning gives the signals back to whoever had them when its trainer is done."""
        process = os.getpid()

        def remember(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                if self.interrupted:
                    raise Stopped("stopped by Ctrl-C at once", INTERRUPTED)
                self.interrupted = True
                # Not by a logger, which may be at it; and not by a fork that writes a checkpoint, which hears it too.
                if os.getpid() == process and os.environ.get("RANK", "0") == "0":
                    os.write(2, b"\nCtrl-C: the job stops after the step or shard at hand; once more, and at once\n")
            self.received = True

        _listening.add(self)
        _handle(remember)


def _handle(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
        # A shell has what runs in the background ignore it.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)
