"""Two deterministic runs on one device, each in a process of its own, are equal bit for bit."""

from pathlib import Path

import pytest
import torch

from tests.faults.jobs import rows, tensors
from tests.gpu.world import MAX_LENGTH
from tests.pipeline.tool import run_tool

STEPS = 6


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_done_again_is_the_same_bit_for_bit(world: Path, method: str, tmp_path: Path) -> None:
    first = tmp_path / "run"
    arguments = [
        f"method={method}",
        f"model.student.path={world / 'student'}",
        f"data.train=[{world / 'pairs.jsonl'}]",
        f"data.max_length={MAX_LENGTH}",
        "data.microbatch_tokens=1024",
        "data.global_batch_size=8",
        "data.num_workers=1",
        "optim.lr=1e-4",
        "trainer.epochs=4",
        f"trainer.max_steps={STEPS}",
        f"run_dir={first}",
        "deterministic=true",
    ]
    for command in (arguments, ["--from-run", str(first)]):
        status, _, stderr = run_tool("train.py", command, tmp_path)
        assert status == 0, stderr
    again = tmp_path / "run-again"
    assert rows(first) == rows(again)
    mine, theirs = (tensors(run / f"checkpoints/step-{STEPS:08d}") for run in (first, again))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
