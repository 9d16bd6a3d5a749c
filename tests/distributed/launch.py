"""Start the processes of a job, and leave none behind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.forks.client import ROOT, run_forked
from tests.pipeline.tool import kill

_WORKER = Path(__file__).with_name("worker.py")


def launch(processes: int, jobs_file: Path, devices: str = "cpu") -> tuple[int, str]:
    """Run ``worker`` on a file of jobs: one process by itself or several, on "cpu" or "cuda".

    On the CPU they are forks of one that has imported everything; a GPU is left to processes of ``torchrun``'s own.

    Returns:
        The exit status, negative the signal that ended the only process; the end of what was printed.
    """
    if devices == "cpu":
        done = run_forked(jobs_file.parent, processes, program=str(_WORKER), arguments=[str(jobs_file)])
        return done.status, f"{done.stdout}\n{done.stderr}"[-10_000:]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    log = jobs_file.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, str(_WORKER), str(jobs_file)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait()
        finally:
            kill(process)
    return process.returncode, log.read_text(errors="replace")[-10_000:]
