"""What every test of kills shares: a process that forks, a tiny world, an account of what was tried and lost."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import small_world

_ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """Runs jobs in forks of a process that has imported everything, see ``zygote``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), "PYTHONWARNINGS": "ignore"},
        )
        self._answer()

    def run(self, **job: Any) -> tuple[list[int], float]:
        """Exit statuses of the ranks, and seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        assert not answer["left"], f"processes that outlive their ranks: {answer['left']}"
        return answer["statuses"], answer["seconds"]

    def close(self) -> None:
        """End it and all that it forked."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for member in family:
            if member.is_running():
                member.kill()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks jobs has ended"
        return json.loads(line)


@dataclass
class Account:
    """What was tried, and what came of it.

    Attributes:
        killed: Ends that were forced, each with where.
        stopped: Jobs that were asked to stop, with the seconds until they had.
        steps_again: Steps that were done a second time, of each kill.
        shards_again: Shards that were scored a second time, of each kill.
    """

    killed: list[str] = field(default_factory=list)
    stopped: list[float] = field(default_factory=list)
    steps_again: list[int] = field(default_factory=list)
    shards_again: list[int] = field(default_factory=list)


_ACCOUNT = Account()


@pytest.fixture(scope="session")
def account() -> Account:
    return _ACCOUNT


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("faults") / "world")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell what was tried."""
    account = _ACCOUNT
    if not account.killed and not account.stopped:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(
        f"{len(account.killed)} kills; steps done again: {sum(account.steps_again)}, at most "
        f"{max(account.steps_again, default=0)} a kill; shards scored again: {sum(account.shards_again)}, at most "
        f"{max(account.shards_again, default=0)} a kill"
    )
    terminalreporter.write_line(
        f"{len(account.stopped)} jobs asked to stop; done after at most {max(account.stopped, default=0):.1f} s"
    )
    for place in account.killed:
        terminalreporter.write_line(f"  {place}")
