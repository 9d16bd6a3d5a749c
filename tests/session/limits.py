"""A limit of time for every test: it is for hangs, not for speed, and far beyond what a loaded machine needs.

At the limit the stacks of all threads are printed, and stand in the report; processes that the test has started get
SIGABRT, at which Python's print theirs to wherever they write, and are ended; the test fails. Where it cannot be
interrupted, as it waits in C code, the process of pytest ends after the stacks, which pytest-xdist reports as the
failure of this test, and goes on with the others.

Tests have 20 minutes, slow ones 60, and ``@pytest.mark.limit(seconds)`` is for those that need more. Fixtures that a
test is the first to need are in its time. ``CTPD_TESTS_LIMIT`` multiplies all.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from types import FrameType

import psutil
import pytest

LIMIT, SLOW = 20 * 60.0, 60 * 60.0
# Seconds: for processes to print their stacks, then for a test to end once they are gone, then for its process to.
_PRINT, _END = 10.0, 60.0
# No one else uses it: libraries interrupt by SIGALRM.
_INTERRUPT = signal.SIGVTALRM


class Limits:
    """Watches the test at hand."""

    def __init__(self) -> None:
        # Neither that of a test, which is captured, nor one that a test closes.
        self._stderr = os.fdopen(os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2), "w")
        self._told: dict[str, str] = {}
        self._may_interrupt = False
        signal.signal(_INTERRUPT, self._interrupt)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        seconds = limit_of(item)
        timer = threading.Timer(seconds, self._at_limit, [item.nodeid, seconds])
        timer.name, timer.daemon = "limit of time", True
        timer.start()
        faulthandler.dump_traceback_later(seconds + _PRINT + _END, file=self._stderr, exit=True)
        try:
            return (yield)
        finally:
            timer.cancel()
            # Where it is at work, it ends this test's processes, and would interrupt the next one.
            timer.join()
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        return (yield from self._interrupted_at_limit())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        return (yield from self._interrupted_at_limit())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        return (yield from self._interrupted_at_limit())

    def _interrupted_at_limit(self) -> Generator[None, None, None]:
        """What is raised in a part of a test is a failure of it; elsewhere it would end pytest."""
        self._may_interrupt = True
        try:
            return (yield)
        finally:
            self._may_interrupt = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._may_interrupt:
            pytest.fail("not done at its limit of time")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        told = self._told.pop(item.nodeid, None)
        if told is not None:
            report.sections.append(("stacks at the limit of time", told))
            if report.passed:
                report.outcome = "failed"
                report.longrepr = f"not done after {limit_of(item):.0f} s; then the processes it had started were ended"
        return report

    def _at_limit(self, test: str, seconds: float) -> None:
        """In the timer's thread."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        below = psutil.Process().children(recursive=True)
        self._told[test] = f"{stacks}\nprocesses below it:\n" + "".join(f"  {_described(one)}\n" for one in below)
        print(f"\n{test}: not done after {seconds:.0f} s\n{self._told[test]}", file=self._stderr, flush=True)
        end_all(below)
        signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)


def limit_of(item: pytest.Item) -> float:
    """Seconds that a test may take."""
    marker = item.get_closest_marker("limit")
    seconds = float(marker.args[0]) if marker else SLOW if item.get_closest_marker("slow") else LIMIT
    return seconds * float(os.environ.get("CTPD_TESTS_LIMIT", "1"))


def end_all(processes: list[psutil.Process]) -> None:
    """End processes: SIGABRT, at which Python's print their stacks, then SIGKILL."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
            # What is stopped hears no signal but SIGKILL.
            process.send_signal(signal.SIGCONT)
    until = time.monotonic() + _PRINT
    # Not waited for: their exit statuses belong to who has started them.
    while time.monotonic() < until and any(map(_runs, processes)):
        time.sleep(0.05)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} gone"


def pytest_configure(config: pytest.Config) -> None:
    # Processes that tests start print their stacks at SIGABRT.
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    config.pluginmanager.register(Limits())
