"""Jobs in forks of one process that has imported everything, see ``server``: real processes, which begin in no time."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
# Seconds that a job may take, far beyond what it does: for hangs. Then for its ranks to end.
BOUND, GRACE = 900.0, 60.0
# What this process may have in its environment as the only one of a job.
_OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Forks:
    """The process that forks; it is started when first needed, and anew where it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 as long as this is there
        self.threads: list[str] = []

    def run(self, **job: Any) -> tuple[list[int], float]:
        """Exit statuses of the ranks, and seconds; see ``server`` for the keys, which have defaults here.

        The ranks find the environment of now, but what is read by an import was read when the process was started.
        """
        process = self._started()
        defaults = {"arguments": [], "ranks": 1, "environment": {}, "apart": False, "fault": None, "spoil": None}
        job = {**defaults, "bound": BOUND, "grace": GRACE, "logs": job.get("folder"), **job}
        job["environment"] = {**_environment(), **job["environment"]}
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answer = self._answer()
        assert not answer["left"], f"processes that outlive their ranks: {answer['left']}"
        return answer["statuses"], answer["seconds"]

    def close(self) -> None:
        """End it and all that it forked."""
        if self._process is None:
            return
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait()
        self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(),
        )
        atexit.register(self.close)
        self.threads = self._answer()["threads"]
        return self._process

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the process that forks jobs has ended\n{self._errors.read()[-5000:]}")
        return json.loads(line)


def _environment() -> dict[str, str]:
    """Of the process and of its forks, which could not use a GPU that it had seen."""
    outer = {name: value for name, value in os.environ.items() if name not in _OF_A_JOB}
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONPATH": str(ROOT)}
    return {**outer, **own, "CUDA_VISIBLE_DEVICES": ""}


FORKS = Forks()


@dataclass(frozen=True)
class Done:
    """What a job was.

    Attributes:
        statuses: Exit statuses of the ranks, negative for signals.
        stdout: Standard output of the ranks, one after the other.
        stderr: Their standard error.
        seconds: How long it took.
    """

    statuses: list[int]
    stdout: str
    stderr: str
    seconds: float

    @property
    def status(self) -> int:
        """That of the only rank; of several what ``torchrun`` makes of it, 1 where any has failed."""
        return self.statuses[0] if len(self.statuses) == 1 else int(any(self.statuses))


def run_forked(folder: Path, ranks: int = 1, **job: Any) -> Done:
    """Run a program or function to its end in ``folder``, in which nothing is written but by itself."""
    with tempfile.TemporaryDirectory() as logs:
        before = time.monotonic()
        try:
            statuses, seconds = FORKS.run(folder=str(folder), ranks=ranks, logs=logs, apart=True, **job)
        except AssertionError as error:
            # Of a job at its limit of time, where it was.
            raise AssertionError(f"{error}\n{_read(logs, ranks, 'log')}\n{_read(logs, ranks, 'err')}") from None
        assert time.monotonic() - before < job.get("bound", BOUND), _read(logs, ranks, "err")
        return Done(statuses, _read(logs, ranks, "log"), _read(logs, ranks, "err"), seconds)


def _read(logs: str, ranks: int, kind: str) -> str:
    files = [Path(logs, f"rank-{rank}.{kind}") for rank in range(ranks)]
    return "".join(file.read_text(errors="replace") for file in files if file.exists())
