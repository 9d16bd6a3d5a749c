"""Workers and signals; workers that die, and loaders that are closed: nobody waits for them without a limit."""

import contextlib
import faulthandler
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from torch.utils.data import get_worker_info

from ctpd_nemo.data.workers import WorkerLoader
from ctpd_nemo.errors import InputError, WorkerDiedError

# An item that is not made before the test has long failed.
FOR_EVER = 3600.0
# Far more than what anything here takes, also where the machine does much else; far less than for ever.
LONG = 300.0


class Numbers:
    def prepare(self) -> None:
        pass

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> int:
        return number


class Stuck(Numbers):
    """Never gets beyond an item; notes in a file that it has come to it."""

    def __init__(self, at: int, note: Path, holding_the_interpreter: bool = False) -> None:
        self.at, self.note, self.holding = at, note, holding_the_interpreter

    def __getitem__(self, number: int) -> int:
        if number == self.at:
            self.note.write_text("")
            if self.holding:
                # One operation of C, of hours: no thread of the worker gets its turn.
                10 ** (10**9)
            time.sleep(FOR_EVER)
        return number


class Bad(Numbers):
    def __getitem__(self, number: int) -> int | InputError:  # type: ignore[override]
        return InputError("row", str(number), "a good one") if number == 3 else number


class Ends(Numbers):
    """A worker that ends itself, in an item."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __getitem__(self, number: int) -> int:
        if number == 2:
            self.end()
        return number


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(3 * LONG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def iterate(task: Numbers, workers: int = 1) -> Iterator[int]:
    return iter(WorkerLoader(task, batch_size=None, num_workers=workers))  # type: ignore[arg-type]


def workers_of(items: Iterator[int], number: int = 1) -> tuple[int, list[psutil.Process]]:
    """The first item, and the workers, which begin with it."""
    before = set(psutil.Process().children())
    first = next(items)
    workers = sorted(set(psutil.Process().children()) - before, key=lambda process: process.pid)
    assert len(workers) == number
    return first, workers


def until_there(note: Path) -> None:
    until = time.monotonic() + LONG
    while not note.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def closed(items: Iterator[int]) -> float:
    """Close a loader; how long it took."""
    before = time.monotonic()
    items.close()  # type: ignore[attr-defined]
    return time.monotonic() - before


def gone(workers: list[psutil.Process]) -> bool:
    return not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_a_worker_ends_when_the_job_says_so_and_no_one_else() -> None:
    items = iterate(Numbers())
    first, (worker,) = workers_of(items)
    assert first == 0
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # More than was made ahead.
    assert [next(items) for _ in range(20)] == list(range(1, 21))
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait(LONG)
    assert closed(items) < LONG


def test_items_come_in_order_and_workers_end_with_the_last() -> None:
    items = iterate(Numbers(), 2)
    first, workers = workers_of(items, 2)
    assert [first, *items] == list(range(100))
    assert gone(workers)


def test_what_is_wrong_with_an_item_is_raised_as_it_was_and_ends_the_workers() -> None:
    items = iterate(Bad(), 2)
    _, workers = workers_of(items, 2)
    with pytest.raises(InputError, match=re.escape("row: found 3; expected a good one")):
        list(items)
    assert gone(workers)


@pytest.mark.parametrize("taken_by_another", [False, True], ids=["", "its status taken by another"])
@pytest.mark.parametrize("at", ["before an item", "within an item", "between items"])
def test_a_worker_that_is_killed_is_named_with_its_signal(at: str, taken_by_another: bool, tmp_path: Path) -> None:
    """Ten loaders at once, each with one worker."""
    jobs = []
    for turn in range(10):
        note = tmp_path / f"{turn}"
        # Items are made ahead, by number: the worker waits in front of the last, or is in the first or a later one.
        items = iterate(Numbers() if at == "between items" else Stuck(0 if at == "before an item" else 7, note))
        answers: list[int | Exception] = []
        taker = threading.Thread(target=_take_all, args=(items, answers), daemon=True)
        before = set(psutil.Process().children())
        if at == "between items":
            next(items)
        else:
            taker.start()
            until_there(note)
        (worker,) = set(psutil.Process().children()) - before
        jobs.append((worker, taker, answers, _killed(worker.pid, taken_by_another)))
    for _, taker, _, _ in jobs:
        if at == "between items":
            taker.start()
    for worker, taker, answers, how in jobs:
        taker.join(LONG)
        assert not taker.is_alive()
        error = answers[-1]
        assert isinstance(error, WorkerDiedError)
        assert str(error).startswith(f"dataloader worker 0 (process {worker.pid}) {how}")
        assert "\n" not in str(error)


def _killed(worker: int, taken_by_another: bool) -> str:
    """Kill a worker, and maybe take its exit status; what is to be said of it."""
    os.kill(worker, signal.SIGKILL)
    if taken_by_another:
        # Unless the loader was faster.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(worker, 0)
            return "has died; something else in this process was told how"
    return "was killed by SIGKILL"


def _take_all(items: Iterator[int], answers: list[int | Exception]) -> None:
    try:
        answers.extend(items)
    except Exception as error:
        answers.append(error)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(3), "has ended with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "was killed by SIGUSR1"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMAX), "was killed by SIGRTMAX"),
    ],
    ids=["exit", "signal", "real-time signal"],
)
def test_a_worker_that_ends_itself_is_named_with_how(end: Callable[[], object], how: str) -> None:
    items = iterate(Ends(end), 2)
    with pytest.raises(WorkerDiedError, match=rf"dataloader worker 0 \(process \d+\) {how}$"):
        list(items)


def test_a_worker_that_dies_raises_nowhere_but_in_the_loader() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    items = iterate(Numbers())
    _, (worker,) = workers_of(items)
    assert signal.getsignal(signal.SIGCHLD) == before
    worker.kill()
    until = time.monotonic() + LONG
    while not gone([worker]):
        assert time.monotonic() < until
        time.sleep(0.01)
    # torch's handler of SIGCHLD would raise here.
    sum(range(1000))
    closed(items)


@pytest.mark.parametrize("holding", [False, True], ids=["asleep", "holding the interpreter"])
def test_closing_a_loader_does_not_wait_for_an_item(holding: bool, tmp_path: Path) -> None:
    items = iterate(Stuck(2, tmp_path / "there", holding))
    _, workers = workers_of(items)
    until_there(tmp_path / "there")
    assert closed(items) < LONG
    assert gone(workers)


@pytest.mark.parametrize("taken_by_another", [False, True])
def test_closing_a_loader_does_not_wait_for_a_worker_that_is_gone(taken_by_another: bool, tmp_path: Path) -> None:
    opened = []
    for turn in range(10):
        items = iterate(Stuck(2, tmp_path / f"{turn}"))
        _, (worker,) = workers_of(items)
        opened.append((items, worker))
    for turn, (items, worker) in enumerate(opened):
        until_there(tmp_path / f"{turn}")
        _killed(worker.pid, taken_by_another)
        assert closed(items) < LONG


def test_a_loader_that_nobody_has_any_more_is_closed(tmp_path: Path) -> None:
    items = iterate(Stuck(2, tmp_path / "there"))
    _, workers = workers_of(items)
    del items
    gc.collect()
    assert gone(workers)


def test_loaders_leave_no_thread_behind() -> None:
    before = threading.active_count()
    for _ in range(3):
        assert list(iterate(Numbers(), 2)) == list(range(100))
        items = iterate(Numbers(), 2)
        next(items)
        closed(items)
    until = time.monotonic() + LONG
    while threading.active_count() > before:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)


def test_workers_are_numbered_and_seeded_as_torch_does() -> None:
    class Seeds(Numbers):
        def __getitem__(self, number: int) -> int:
            info = get_worker_info()
            assert info is not None
            return info.id

    assert list(iterate(Seeds(), 2)) == [0, 1] * 50


def test_a_process_ends_although_its_workers_never_do(tmp_path: Path) -> None:
    """One is stuck, one was killed, of one the status was taken as well."""
    code = f"""if True:
        import os, pathlib
        from tests.data.test_workers import Stuck, iterate, until_there, workers_of
        open_yet = []
        for then in ("stuck", "killed", "taken"):
            note = pathlib.Path({str(tmp_path)!r}) / then
            items = iterate(Stuck(2, note, holding_the_interpreter=True))
            _, (worker,) = workers_of(items)
            until_there(note)
            if then != "stuck":
                worker.kill()
            if then == "taken":
                os.waitpid(worker.pid, 0)
            open_yet.append(items)
            print(worker.pid)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG, check=True)
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())
