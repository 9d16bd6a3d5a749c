"""Forks are processes as any others: streams, statuses, an environment of their own, and none is left behind."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.forks.client import FORKS, run_forked

HERE = __name__


def told(rank: int, *arguments: str) -> None:
    """What a rank sees, on both of its streams."""
    print(rank, os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.environ.get("OF_A_TEST"), *arguments)
    print(os.getcwd(), threading.active_count(), "torch" in sys.modules, file=sys.stderr)


def ends(rank: int, how: str) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else sys.exit(int(how))
    time.sleep(3600)


def waits(rank: int, note: str) -> None:
    Path(note).write_text(str(os.getpid()))
    time.sleep(3600)


def test_ranks_have_streams_folder_and_environment_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_A_TEST", "set after the process was started")
    one = run_forked(tmp_path, function=f"{HERE}:told", arguments=["a", "b"])
    assert (one.statuses, one.stdout) == ([0], "0 None None set after the process was started a b\n")
    assert one.stderr == f"{tmp_path} 1 True\n"
    two = run_forked(tmp_path, 2, function=f"{HERE}:told")
    assert two.stdout.splitlines() == [f"{rank} {rank} 2 set after the process was started" for rank in (0, 1)]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("OF_A_TEST")
    assert run_forked(tmp_path, function=f"{HERE}:told").stdout == "0 None None None\n"


@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("3", 3)])
def test_when_one_rank_fails_the_others_are_ended(how: str, status: int, tmp_path: Path) -> None:
    done = run_forked(tmp_path, 2, function=f"{HERE}:ends", arguments=[how])
    assert done.statuses == [status, -signal.SIGTERM]
    assert done.status == 1
    assert run_forked(tmp_path, function=f"{HERE}:ends", arguments=[how]).status == status


def test_what_forks_has_no_thread_that_could_hold_a_lock(tmp_path: Path) -> None:
    run_forked(tmp_path, function=f"{HERE}:told")
    # Arrow's allocator has one of its own, and handlers for forks.
    assert set(FORKS.threads) <= {"jemalloc_bg_thd"}


def test_one_that_has_ended_is_started_again_and_takes_its_ranks_along(tmp_path: Path) -> None:
    note, errors = tmp_path / "note", []

    def job() -> None:
        try:
            run_forked(tmp_path, function=f"{HERE}:waits", arguments=[str(note)])
        except AssertionError as error:
            errors.append(str(error))

    thread = threading.Thread(target=job)
    thread.start()
    while not note.exists() or not note.read_text():
        time.sleep(0.01)
    rank = psutil.Process(int(note.read_text()))
    os.kill(rank.ppid(), signal.SIGKILL)
    thread.join()
    assert "has ended" in errors[0]
    rank.wait()
    assert run_forked(tmp_path, function=f"{HERE}:told").statuses == [0]
