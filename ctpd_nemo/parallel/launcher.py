"""Ranks end with the launcher that started them, however it ends.

A launcher passes on the signals that it hears. One that is killed by SIGKILL hears none: its ranks would train on and
hold their GPUs while the job is started anew. What was written so far is whole, as after any kill.

A process that was started by hand has no launcher, and outlives its shell: ``nohup python tools/train.py &``.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from psutil import Process

from ctpd_nemo.parallel.children import children_end_too, start_deaf

# What a launcher gives each process that it starts, and has not itself: torchrun, Open MPI, others by PMIx and PMI,
# and Slurm's step. The first that is there holds: torchrun may be started by a step.
_TORCHRUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
_MARKS = (_TORCHRUN, ("OMPI_COMM_WORLD_RANK",), ("PMIX_RANK",), ("PMI_RANK",), ("SLURM_PROCID",))
_LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1

# What holds for as long as this process lives.
_held: list[contextlib.ExitStack] = []
_watched: list[Process] = []


def end_with_launcher() -> None:
    """End this process with status 1 as soon as its launcher is gone, and what it forks as soon as it has ended itself.

    Called early, and by the main thread; further calls do nothing. Under ``torchrun`` on Linux the kernel does it, at
    once and whatever the process is at. A thread looks as well, as there may be a shell between the two.
    """
    if not _held:
        _held.append(contextlib.ExitStack())
        _held[0].enter_context(children_end_too())
    if _watched or (marks := _marks(os.environ)) is None:
        return
    me, parent = Process(), os.getppid()
    launcher = find_launcher({name: os.environ.get(name) for name in marks}, me.parents())
    if launcher is None:
        return
    if all(name in os.environ for name in _TORCHRUN) and launcher.pid == 1 and not _is_python(1):
        # Init, which takes in what has lost its parent: torchrun was killed before this process could look.
        os._exit(1)
    _watched.append(launcher)
    if marks == _TORCHRUN and launcher.pid == parent:
        _die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    start_deaf(threading.Thread(target=_watch, args=[launcher], name="launcher watch", daemon=True))


def find_launcher(marks: Mapping[str, str | None], ancestors: Iterable[Process]) -> Process | None:
    """The nearest ancestor that has not the marks of this process: what is between has inherited them, as this has.

    Args:
        marks: What the launcher gave this process.
        ancestors: The parent first.

    Returns:
        ``None`` where all that can be seen have them.
    """
    for ancestor in ancestors:
        try:
            environ = ancestor.environ()
        except (psutil.Error, OSError):
            # Of another user: Slurm's, for one. What a process started itself it can look at.
            return ancestor
        if any(environ.get(name) != value for name, value in marks.items()):
            return ancestor
    return None


def _marks(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    return next((marks for marks in _MARKS if marks[0] in environ), None)


def _is_python(pid: int) -> bool:
    """Whether a process may be a ``torchrun``: what cannot be looked at may be."""
    try:
        words = Process(pid).cmdline()[:2]
    except (psutil.Error, OSError):
        return True
    return any(name in Path(word).name for word in words for name in ("python", "torchrun"))


def _die_with_parent() -> None:
    """Have the kernel send SIGKILL when the thread that started this process ends: of torchrun, the main one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _watch(launcher: Process) -> None:
    while _is_alive(launcher):
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _is_alive(process: Process) -> bool:
    """Whether it runs, or is stopped; one that has ended may be there until whoever started it looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
