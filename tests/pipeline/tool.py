"""The tools as processes, of which none is left behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tests.forks.client import ROOT, TOOLS, run_forked


@contextlib.contextmanager
def started(tool: str, arguments: Sequence[str], folder: Path, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A tool that runs in ``folder``, under ``torchrun`` where it is to be several processes; killed at the end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, str(TOOLS / tool), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """End a process and all below it at once; torchrun gives each of its workers a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def run_tool(
    tool: str, arguments: Sequence[str], folder: Path, processes: int = 1, fresh: bool = False
) -> tuple[int, str, str]:
    """Run a tool to its end; its exit status, standard output and standard error.

    ``fresh``: in an interpreter of its own, under ``torchrun`` itself where it is several processes; else in forks of
    one that has imported everything, at a tenth of the cost.
    """
    if fresh:
        with started(tool, arguments, folder, processes) as process:
            stdout, stderr = process.communicate()
            return process.returncode, stdout, stderr
    done = run_forked(folder, processes, program=str(TOOLS / tool), arguments=list(arguments))
    return done.status, done.stdout, done.stderr
