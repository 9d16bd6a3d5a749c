"""Start the processes of a job, and leave none behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

_ROOT = Path(__file__).resolve().parents[2]
_WORKER = Path(__file__).with_name("worker.py")


class LaunchError(AssertionError):
    """A job that failed or did not end; the message has the end of its standard error."""


def launch(processes: int, jobs_file: Path, timeout: float = 600.0, devices: str = "cpu") -> tuple[int, str]:
    """Run ``worker`` on a file of jobs: one process by itself, several under ``torchrun``; on "cpu" or "cuda".

    Returns:
        The exit status, negative the signal that ended it; the end of what was printed.

    Raises:
        LaunchError: It was not done in time.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), "PYTHONFAULTHANDLER": "1"}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if devices == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = jobs_file.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, str(_WORKER), str(jobs_file)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(timeout)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise LaunchError(f"{jobs_file.name}: not done after {timeout:.0f} s\n{_tail(log)}") from None
            raise
    return status, _tail(log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all below it, politely first; torchrun gives each worker a session of its own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=10)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _tail(log: Path, characters: int = 10_000) -> str:
    return log.read_text(errors="replace")[-characters:]
