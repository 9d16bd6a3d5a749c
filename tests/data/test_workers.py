"""Workers and signals."""

import os
import signal
import subprocess

import psutil

from ctpd_nemo.data.workers import WorkerLoader


class Numbers:
    def prepare(self) -> None:
        pass

    def __len__(self) -> int:
        return 100

    def __getitem__(self, number: int) -> int:
        return number


def test_a_worker_ends_when_the_job_says_so_and_no_one_else() -> None:
    items = iter(WorkerLoader(Numbers(), batch_size=None, num_workers=1))  # type: ignore[arg-type]
    before = set(psutil.Process().children())
    assert next(items) == 0
    (worker,) = set(psutil.Process().children()) - before
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    # More than was made ahead.
    assert [next(items) for _ in range(20)] == list(range(1, 21))
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait(10)
