"""Items of worker processes, taken ahead; whatever becomes of a worker, nobody waits for it without a limit."""

import atexit
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.queues import Queue
from typing import Any

from ctpd_nemo.errors import WorkerDiedError

# Seconds: between looks at the workers while no item comes; for what is under way when all is to end; for a process to
# be gone once it was killed; and until a worker that is gone, no one knows how, is taken for the reason of a wait.
_LOOK, _GRACE, _GONE, _PATIENCE = 1.0, 2.0, 10.0, 60.0


class _Worker(ForkProcess):
    """A process that is known to be gone, also where another part of this one has taken its exit status.

    ``multiprocessing`` then believes it alive for ever.
    """

    def is_alive(self) -> bool:
        """Whether it still holds its end of the pipe that it was started with."""
        return not wait([self.sentinel], 0)


class WorkerContext(ForkContext):
    """Makes the processes and queues of one iteration.

    Attributes:
        workers: Its processes.
    """

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # type: ignore[override]
        """A process, not yet started."""
        self.workers.append(_Worker(*arguments, **named))
        return self.workers[-1]

    def Queue(self, maxsize: int = 0) -> "Queue[Any]":
        """A queue for whose last items this process does not wait at its end: who was to read them may be gone."""
        made = super().Queue(maxsize)
        made.cancel_join_thread()
        return made


class Ahead(Iterator[Any]):
    """Takes each item in a thread while the one before it is in use, as that takes milliseconds.

    The iterator of the workers is that thread's alone, to its end: a worker that was killed may have held a lock, or
    have left half a message in a pipe, so whoever touches it may wait for ever. Nobody waits for the thread.
    """

    def __init__(self, items: Iterator[Any], workers: list[_Worker]) -> None:
        self._workers = workers
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._taken: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._wanted.put(True)
        arguments = (items, self._wanted, self._taken)
        self._thread = threading.Thread(target=_take, args=arguments, name="data", daemon=True)
        self._thread.start()
        # Before ``multiprocessing``, which asks its processes to end and waits until they have.
        atexit.register(self.close)

    def __next__(self) -> Any:
        """The next item.

        Raises:
            WorkerDiedError: A worker has died.
        """
        item, error = self._get()
        if error is None:
            self._wanted.put(True)
            return item
        # What is raised where a worker is gone is one of many things, and says of none how it ended.
        dead = self._dead()
        if dead and not isinstance(error, StopIteration):
            raise WorkerDiedError(dead) from None
        raise error

    def close(self) -> None:
        """End the workers, whatever they do, and the thread."""
        atexit.unregister(self.close)
        self._wanted.put(False)
        # Workers that are between two items end by themselves.
        self._thread.join(_GRACE)
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        for worker in self._workers:
            worker.join(_GONE)

    def _get(self) -> tuple[Any, BaseException | None]:
        """What the thread has taken, an item or an error."""
        gone_since = None
        while True:
            try:
                return self._taken.get(timeout=_LOOK)
            except queue.Empty:
                if all(worker.is_alive() for worker in self._workers):
                    continue
            gone_since = gone_since or time.monotonic()
            if dead := self._dead(known=time.monotonic() - gone_since < _PATIENCE):
                return None, WorkerDiedError(dead)

    def _dead(self, known: bool = False) -> str:
        """The workers that have died, and how; ``known``: only those that are known not to have ended well."""
        gone = [(number, worker) for number, worker in enumerate(self._workers) if not worker.is_alive()]
        ends = [(number, worker, _exit_code(worker)) for number, worker in gone]
        return "; ".join(
            f"dataloader worker {number} (process {worker.pid}) {_told(code)}"
            for number, worker, code in ends
            if code != 0 and not (known and code is None)
        )


def _take(items: Iterator[Any], wanted: Any, taken: Any) -> None:
    """In the thread: an item for each that is wanted, until there is an end or an error."""
    try:
        while wanted.get():
            taken.put((next(items), None))
    except BaseException as error:
        # Its frames hold the iterator, which may be waited for where it is let go.
        met: BaseException | None = error
        while met is not None:
            traceback.clear_frames(met.__traceback__)
            met = met.__cause__ or met.__context__
        taken.put((None, error))
    # Here, and not in who started this: this ends the workers.
    del items


def _exit_code(worker: _Worker) -> int | None:
    """How a worker that is gone has ended; ``None`` where another part of this process has taken its exit status."""
    for _ in range(10):
        worker.join(_GONE)
        if worker.exitcode is not None:
            return worker.exitcode
        # The thread may be about to write it down.
        time.sleep(0.05)
    return None


def _told(code: int | None) -> str:
    if code is None:
        return "has died; something else in this process was told how"
    if code > 0:
        return f"has ended with status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
