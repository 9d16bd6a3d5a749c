"""Ranks that hang are found and named: every rank says what it is at, and one that waits too long looks who is late.

Torch ends a collective that does not return, but the ranks that wait do not know for whom. Here a thread of each rank
writes to the job's store what its main thread is at. Once a rank has stood waiting for ``parallel.timeout_minutes``,
all ranks write their stacks and flight records to ``hang`` in the run folder, one says who it was that did not wait,
and the processes end with status 1. A rank that is busy while nobody waits for it that long is left alone.
"""

import atexit
import faulthandler
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ctpd_nemo.parallel.standstill import Standing, Standstill, flight_records, name_records
from ctpd_nemo.run_folder import make_within

T = TypeVar("T")

# What torch's own limit is longer by: it ends the job where this thread cannot.
GRACE_MINUTES = 1.0
_STATUS = 1
_MOST_NAMED = 8
# How long the store may take to answer.
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        beat: How many times it has said something.
        time: When, in seconds of its own clock.
        place: The part of the job that it is in.
        seconds: For how long it has been there.
        line: What its main thread is at.
        waits: Whether it waits for other ranks.
        process: Its node and the number of its process.
    """

    beat: int
    time: float
    place: str
    seconds: float
    line: str
    waits: bool
    process: str


Reports = dict[int, Report | None]


class HangWatch:
    """The thread that says what this rank is at, and raises the alarm."""

    def __init__(self, store: Any, rank: int, ranks: int, folder: Path, limit_seconds: float) -> None:
        """Args:
        store: That of the job; a connection of its own, as the main thread may hold another.
        rank: Of this process.
        ranks: How many there are.
        folder: Where stacks go; it is made when there are some.
        limit_seconds: How long a rank may stand waiting.
        """
        self.folder = folder
        self._store, self._rank, self._ranks, self._limit = store, rank, ranks, limit_seconds
        self._beat_seconds = min(5.0, limit_seconds / 10)
        self._standstill = Standstill()
        self._place, self._since, self._beats = "the beginning", time.monotonic(), 0
        self._asking: threading.Thread | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

    def start(self) -> None:
        """Begin; ends with the process."""
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Say nothing more."""
        self._ended.set()
        self._thread.join(_ANSWER_SECONDS)

    def at(self, place: str) -> None:
        """The main thread has come to a part of the job."""
        self._place, self._since = place, time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            standing = self._standstill.look()
            alarmed = self._answer(functools.partial(self._say, standing))
            if alarmed or (standing.waits and standing.seconds >= self._limit):
                self._alarm()

    def _say(self, standing: Standing) -> bool:
        """Write down what this rank is at; whether some rank has raised the alarm."""
        self._beats += 1
        process = f"{socket.gethostname()}, process {os.getpid()}"
        seconds = time.monotonic() - self._since
        report = Report(self._beats, time.time(), self._place, seconds, standing.line, standing.waits, process)
        self._store.set(f"hang/{self._rank}", json.dumps(asdict(report)))
        return bool(self._store.check(["hang/alarm"]))

    def _read(self) -> Reports:
        """What all ranks have said last."""
        keys = {rank: f"hang/{rank}" for rank in range(self._ranks)}
        return {
            rank: Report(**json.loads(self._store.get(key))) if self._store.check([key]) else None
            for rank, key in keys.items()
        }

    def _answer(self, ask: Callable[[], T]) -> T | None:
        """What the store answers; ``None`` where it does not in time: who keeps it may be who hangs."""
        answers: list[T] = []

        def asking() -> None:
            try:
                answers.append(ask())
            except RuntimeError:
                # Torch's word for a store that is gone.
                return

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=asking, daemon=True)
            self._asking.start()
            self._asking.join(_ANSWER_SECONDS)
        return answers[0] if answers else None

    def _alarm(self) -> None:
        """Find out who is late, say so, and end the process."""
        self._answer(lambda: self._store.set("hang/alarm", str(self._rank)))
        self._write_stacks()
        before = self._answer(self._read)
        for _ in range(3):
            # Whoever still runs is heard of.
            time.sleep(self._beat_seconds)
            standing = self._standstill.look()
            self._answer(functools.partial(self._say, standing))
        after = self._answer(self._read) if before else None
        told = self._answer(lambda: self._store.add("hang/told", 1)) if after else None
        if before and after:
            message, speaks = explain(before, after), told == 1
        else:
            waiting = f"rank {self._rank} in {self._place}, in {self._standstill.look().line}"
            message, speaks = f"{_mute_store()}; waiting: {waiting}", self._rank == 1
        if speaks:
            waited = f"waited for {self._limit:.0f} s, parallel.timeout_minutes"
            where = f"{self.folder} has the stacks of all ranks that could write them"
            # Not through Python's stream: the main thread may hold its lock.
            os.write(2, f"error: {waited}: {message}; {where}\n".encode())
        time.sleep(2 * self._beat_seconds)
        os._exit(_STATUS)

    def _write_stacks(self) -> None:
        standing = self._standstill.look()
        try:
            make_within(self.folder.parent, self.folder.name)
            with (self.folder / f"rank-{self._rank}.txt").open("w") as file:
                file.write(f"rank {self._rank}, {self._place}: {standing.line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            # A job on GPUs may have a second one, of its groups on the CPU.
            for ending, record in zip(("", "-cpu"), flight_records(), strict=False):
                (self.folder / f"flight-record-{self._rank}{ending}.json").write_text(json.dumps(record))
        except OSError as error:
            os.write(2, f"{self.folder}: no stacks of rank {self._rank}: {error}\n".encode())


def explain(before: Reports, after: Reports) -> str:
    """Who is late, and what the others wait in.

    Args:
        before: What each rank has said last; ``None`` where it has not said anything.
        after: The same some beats later: a rank of which nothing new is heard is stopped, or gone.
    """
    silent = [rank for rank, report in after.items() if report is None or report == before[rank]]
    waiting = [rank for rank, report in after.items() if report is not None and report.waits and rank not in silent]
    late = [rank for rank in after if rank not in waiting]
    now = max(report.time for report in after.values() if report is not None)
    told = [_late(rank, after[rank], now if rank in silent else None) for rank in late]
    waits = [f"rank {rank} in {report.line}" for rank in waiting if (report := after[rank]) is not None]
    if not late:
        return f"all ranks wait for each other: {_some(waits)}"
    return f"{_some(told)}; waiting: {_some(waits)}"


def _late(rank: int, report: Report | None, silent_at: float | None) -> str:
    if report is None:
        return f"rank {rank} has never been heard of"
    if silent_at is None:
        at = f"for {report.seconds:.0f} s: it is in {report.line}"
    else:
        heard = silent_at - report.time
        at = (
            f"for {report.seconds + heard:.0f} s, and was last heard of {heard:.0f} s ago: stopped, or its node is gone"
        )
    return f"rank {rank} ({report.process}) has not come beyond {report.place} {at}"


def _some(parts: list[str]) -> str:
    more = f", and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return ", ".join(parts[:_MOST_NAMED]) + more


def _mute_store() -> str:
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = "the first node's torchrun" if by_agent else "rank 0"
    return f"{keeper}, which keeps the job's store, does not answer"


_watch: HangWatch | None = None


def watch_for_hangs(folder: Path, timeout_minutes: float) -> None:
    """Watch this rank from now on; where it is watched already, stacks go to another folder from now on.

    Args:
        folder: The run folder; stacks and flight records go to ``hang`` in it.
        timeout_minutes: How long a rank may stand waiting for others; for good, with the first call.
    """
    global _watch
    if dist.get_world_size() == 1:
        return
    folder = folder / "hang"
    name_records(folder / "nccl-")
    if _watch is not None:
        _watch.folder = folder
    else:
        if dist.get_backend() == "nccl":
            # Torch's watchdog makes no folders.
            folder.mkdir(parents=True, exist_ok=True)
        store: Any = dist.distributed_c10d._get_default_store()
        # Older torch has no way to a second connection.
        store = store.clone() if hasattr(store, "clone") else store
        _watch = HangWatch(store, dist.get_rank(), dist.get_world_size(), folder, 60 * timeout_minutes)
        _watch.start()


def at(place: str) -> None:
    """Say which part of the job this rank has come to, for whoever looks for it."""
    if _watch is not None:
        _watch.at(place)
