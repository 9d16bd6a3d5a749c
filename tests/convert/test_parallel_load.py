"""Two processes over gloo load their own slices; together they compute the logits of ``transformers``."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

CASES = ["llama-rope3-tied", "qwen2", "qwen3-tied", "mistral"]
LAYOUTS = ["2,1,1", "1,2,2"]  # tensor, pipeline, virtual pipeline


def run_two(arguments: list[str]) -> str:
    """Standard output of the worker, run by two processes."""
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[2])}
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.terminate()  # unlike a kill, this lets it end its workers
            raise
    assert process.returncode == 0, errors[-4000:]
    return output


def test_two_ranks_reproduce_the_logits(tiny_model: Callable, tmp_path: Path) -> None:
    folders = []
    for name in CASES:
        tiny = tiny_model(name)
        ids = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = tiny.model(ids[None]).logits[0]
        folder = tmp_path / name
        folder.symlink_to(tiny.folder)
        torch.save({"ids": ids, "logits": logits}, folder.with_suffix(".pt"))
        folders.append(str(folder))
    output = run_two([":".join(LAYOUTS), *folders])
    rows = [line.split()[1:] for line in output.splitlines() if line.startswith("logits ")]
    assert [row[:2] for row in rows] == [[layout, case] for layout in LAYOUTS for case in CASES]
    assert all(float(difference) < 1e-4 for *_, difference in rows), rows
