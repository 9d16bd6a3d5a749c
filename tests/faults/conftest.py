"""What every test of kills shares: a process that forks, a tiny world, an account of what was tried and lost."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.forks.client import FORKS
from tests.forks.client import Forks as Zygote
from tests.pipeline.recipe import small_world


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
def zygote() -> Zygote:
    return FORKS


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
