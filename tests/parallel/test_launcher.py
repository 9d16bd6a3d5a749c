"""Ranks end with whatever started them as ranks, also where it is killed; what was started by hand lives on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from ctpd_nemo.parallel import launcher
from ctpd_nemo.parallel.children import start_deaf
from ctpd_nemo.parallel.launcher import end_with_launcher, find_launcher
from ctpd_nemo.pipeline import entry

_ROOT = Path(__file__).resolve().parents[2]
_RANK = Path(__file__).with_name("launched.py")
_LONG = 120.0
_LAUNCHED = ("TORCHELASTIC_", "OMPI_", "PMI", "SLURM_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_")


@dataclass
class Ancestor:
    """A process above, by what it was started with; ``None`` for one that this user may not look at."""

    pid: int
    started_with: dict[str, str] | None = field(default_factory=dict)

    def environ(self) -> dict[str, str]:
        if self.started_with is None:
            raise psutil.AccessDenied(self.pid)
        return self.started_with


MINE = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": "/tmp/a/0/error.json"}


@pytest.mark.parametrize(
    ("marks", "above", "found"),
    [
        (MINE, [{}], 0),
        # A shell, or numactl, between.
        (MINE, [MINE, MINE, {"HOME": "/"}, {}], 2),
        # A torchrun below another one.
        (MINE, [{**MINE, "TORCHELASTIC_ERROR_FILE": "/tmp/b/0/error.json"}, {}], 0),
        # Slurm's own process, which belongs to root.
        ({"SLURM_PROCID": "3"}, [{"SLURM_PROCID": "3"}, None, {}], 1),
        ({"OMPI_COMM_WORLD_RANK": "1"}, [{"OMPI_COMM_WORLD_RANK": "0"}], 0),
        # All that can be seen have inherited the same: whoever gave it is out of sight, or gone.
        (MINE, [MINE, MINE], None),
        (MINE, [], None),
    ],
)
def test_the_launcher_is_the_nearest_that_has_not_what_it_gave(
    marks: dict[str, str], above: list[dict[str, str] | None], found: int | None
) -> None:
    ancestors: Any = [Ancestor(number, started_with) for number, started_with in enumerate(above)]
    launcher_ = find_launcher(marks, ancestors)
    assert (launcher_ and launcher_.pid) == found


def test_a_process_without_a_launcher_watches_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(_LAUNCHED)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launcher, "_watched", [])
    monkeypatch.setattr(launcher, "start_deaf", pytest.fail)
    end_with_launcher()
    assert not launcher._watched


@pytest.mark.parametrize(
    ("parent_is", "ends"),
    [
        (["/sbin/init"], True),
        (["tini", "--", "sleep"], True),
        # torchrun is the first process of a container.
        (["/usr/bin/python3.11", "/usr/bin/torchrun", "train.py"], False),
        (["torchrun"], False),
        (None, False),
    ],
)
def test_a_rank_whose_launcher_was_gone_before_it_looked_ends_at_once(
    parent_is: list[str] | None, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent is process 1, which takes in what has lost its own, and which may also be the launcher itself."""

    class One:
        pid = 1

        def __init__(self, pid: int = 0) -> None:
            self.one = pid == 1

        def cmdline(self) -> list[str]:
            if parent_is is None:
                raise psutil.AccessDenied(1)
            return parent_is

        def parents(self) -> list["One"]:
            return [One(1)]

        def environ(self) -> dict[str, str]:
            return {}

    for name, value in MINE.items():
        monkeypatch.setenv(name, value)
    for name, value in (("_watched", []), ("Process", One), ("_die_with_parent", lambda: None)):
        monkeypatch.setattr(launcher, name, value)
    monkeypatch.setattr(launcher.os, "getppid", lambda: 1)
    monkeypatch.setattr(launcher, "start_deaf", lambda thread: None)
    monkeypatch.setattr(launcher.os, "_exit", _leave)
    if ends:
        with pytest.raises(SystemExit, match="1"):
            end_with_launcher()
    else:
        end_with_launcher()
        assert [watched.pid for watched in launcher._watched] == [1]


def _leave(status: int) -> None:
    raise SystemExit(status)


def test_every_tool_ends_with_its_launcher_from_its_first_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []
    monkeypatch.setattr(entry, "stop_at_once", lambda _: began.append("signals"))
    monkeypatch.setattr(entry, "end_with_launcher", lambda: began.append("launcher"))

    def imports() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.quiet, "before_imports", imports)
    with pytest.raises(KeyboardInterrupt):
        entry.tool("train")(lambda config: None)()
    assert began == ["signals", "launcher"]


def _until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + _LONG
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def _ended(process: psutil.Process) -> bool:
    """Whether it has, reaped or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _started(command: list[str], folder: Path, names: list[str]) -> Iterator[tuple[Any, dict[str, psutil.Process]]]:
    """A command, and the processes below it that say who they are; none is left behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    found: dict[str, psutil.Process] = {}
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _until(lambda: all((folder / name).exists() for name in names))
            found |= {name: psutil.Process(int((folder / name).read_text())) for name in names}
            yield process, found
        finally:
            process.kill()
            for member in found.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


def test_ranks_and_what_they_forked_end_when_torchrun_is_killed(tmp_path: Path) -> None:
    """One is torchrun's own child, the other that of a shell between."""
    wrapper = tmp_path / "wrapper.sh"
    shell = f'"{sys.executable}" "{_RANK}" "$1"'
    wrapper.write_text(f'#!/bin/sh\n[ "$RANK" = 0 ] && exec {shell}\n{shell}\nexit 0\n')
    wrapper.chmod(0o755)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    names = ["rank-0", "rank-1", "child-0", "child-1"]
    with _started([*torchrun, str(wrapper), str(tmp_path)], tmp_path, names) as (process, ranks):
        assert process.pid in [parent.pid for parent in ranks["rank-1"].parents()][1:]
        assert not any(_ended(rank) for rank in ranks.values())
        process.send_signal(signal.SIGKILL)
        process.wait()
        _until(lambda: all(_ended(rank) for rank in ranks.values()))


_LAUNCHER = """
import os, subprocess, sys
marks = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"]
ranks = [{"RANK": str(n), mark: str(n)} for n, mark in enumerate(marks)]
started = [subprocess.Popen(sys.argv[1:], env={**os.environ, **rank}) for rank in ranks]
[process.wait() for process in started]
"""


def test_ranks_end_when_another_launcher_is_killed(tmp_path: Path) -> None:
    """One that says which process is which as Open MPI does, as PMIx or PMI do, or as Slurm does."""
    names = [f"{kind}-{rank}" for rank in range(4) for kind in ("rank", "child")]
    command = [sys.executable, "-c", _LAUNCHER, sys.executable, str(_RANK), str(tmp_path)]
    with _started(command, tmp_path, names) as (process, ranks):
        process.send_signal(signal.SIGKILL)
        process.wait()
        _until(lambda: all(_ended(rank) for rank in ranks.values()))


def test_a_signal_that_a_process_waits_for_is_not_taken_by_what_watches_its_parent() -> None:
    """Dataloader workers wait for SIGTERM of their job, and leave a scheduler's to the job."""
    asked = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    found: list[set[Any]] = []
    thread = threading.Thread(target=lambda: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    start_deaf(thread)
    thread.join()
    assert found[0] >= asked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_job_that_was_started_by_hand_outlives_its_shell(tmp_path: Path) -> None:
    """Also as a rank by hand, whose variables no launcher has given."""
    ranks = "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=1"
    command = f'{ranks} nohup "{sys.executable}" "{_RANK}" "{tmp_path}" & wait'
    with _started(["sh", "-c", command], tmp_path, ["rank-0", "child-0"]) as (shell, processes):
        shell.send_signal(signal.SIGKILL)
        shell.wait()
        # As long as a look for the launcher takes, and another one.
        time.sleep(2.5 * launcher._LOOK_SECONDS)
        assert not any(_ended(process) for process in processes.values())


def test_what_a_killed_job_has_forked_ends_whoever_holds_its_pipes(tmp_path: Path) -> None:
    """A job by hand that is killed: no launcher has to end for its workers to."""
    with _started([sys.executable, str(_RANK), str(tmp_path)], tmp_path, ["rank-0", "child-0"]) as (job, processes):
        job.send_signal(signal.SIGKILL)
        job.wait()
        _until(lambda: _ended(processes["child-0"]))
