"""Where the CPU time of the tests goes: seconds of each test, with those of all processes that it started.

``CTPD_TESTS_CPU=FOLDER pytest ...`` writes them there, a file for each process of pytest, and
``python -m tests.session.cpu_time FOLDER`` prints them by folder, file and test. What tests share counts for the first
of them, as its ``setup``.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest


def cpu_seconds() -> float:
    """CPU time so far, of this process, what it has waited for, and what is running below it."""
    me = psutil.Process()
    total = _seconds(me)
    for below in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += _seconds(below)
    return total


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


class Recorder:
    """Writes a line for the start of this process, each part of each test, and the end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}.jsonl").open("w")
        self._before = 0.0

    def note(self, test: str, part: str) -> None:
        """What was used since the last note."""
        now = cpu_seconds()
        row = {"test": test, "part": part, "seconds": now - self._before, "at": time.time()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._before = now

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        self.note("", "between tests")
        try:
            return (yield)
        finally:
            self.note(item.nodeid, "setup")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            self.note(item.nodeid, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            self.note(item.nodeid, "teardown")

    def pytest_collection_finish(self) -> None:
        self.note("", "start and collection")


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("CTPD_TESTS_CPU")
    # Where pytest has processes of its own, the one that started them runs no test.
    only_distributes = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if folder and not only_distributes:
        config.pluginmanager.register(Recorder(Path(folder)))


def main(folder: Path, most: int = 40) -> None:
    """Print what was recorded in a folder."""
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    tables: dict[str, Counter[str]] = {name: Counter() for name in ("folder", "file", "part", "test")}
    for row in rows:
        # pytest-xdist writes the group of a test behind its name.
        file = row["test"].split("::")[0].split("@")[0]
        folder_name = "/".join(file.split("/")[:2]) or row["part"]
        tables["folder"][folder_name] += row["seconds"]
        tables["file"][file or row["part"]] += row["seconds"]
        tables["part"][row["part"]] += row["seconds"]
        tables["test"][f"{row['test']} {row['part']}"] += row["seconds"]
    for name, table in tables.items():
        print(f"\nCPU seconds by {name}, {sum(table.values()):.0f} in all")
        for key, seconds in table.most_common(most):
            print(f"{seconds:9.1f}  {key}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:]))
