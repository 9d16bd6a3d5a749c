"""The tools as processes of their own, of which none is left behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

_ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def started(tool: str, arguments: Sequence[str], folder: Path, processes: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A tool that runs in ``folder``, under ``torchrun`` where it is to be several processes; killed at the end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, str(_ROOT / "tools" / tool), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
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


def run_tool(tool: str, arguments: Sequence[str], folder: Path, processes: int = 1) -> tuple[int, str, str]:
    """Run a tool to its end; its exit status, standard output and standard error."""
    with started(tool, arguments, folder, processes) as process:
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr
