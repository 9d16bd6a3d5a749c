"""Layouts over NCCL, each beside one device: needs as many GPUs as its name says."""

import json
from pathlib import Path

import pytest

from tests.distributed.jobs import job
from tests.distributed.launch import launch
from tests.gpu.world import MAX_LENGTH

LAYOUTS = {
    "tp2-sequence": (2, {"tensor": 2, "sequence": True}, {}),
    "tp2-overlap": (2, {"tensor": 2, "sequence": True, "overlap_tensor": True}, {}),
    "pp2": (2, {"pipeline": 2}, {}),
    "pp2vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "cp2": (2, {"context": 2}, {}),
    "cp2-a2a": (2, {"context": 2, "context_communication": "a2a"}, {}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "tp2-fp8": (2, {"tensor": 2, "sequence": True}, {"fp8": "current"}),
    "cp2-fp8": (2, {"context": 2}, {"fp8": "current"}),
    "tp2pp2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}, {}),
    "tp2cp2": (4, {"tensor": 2, "context": 2, "sequence": True}, {}),
}
# bf16 sums in another order; FP8 with scales over other shares.
TOLERANCE = {"bf16": 0.02, "fp8": 0.1}


def losses(world: Path, home: Path, name: str, processes: int, parallel: dict, precision: dict) -> list[float]:
    parts = {
        "method": {"name": "dpo"},
        "model": {"student": {"path": str(world / "student")}},
        "parallel": parallel,
        "precision": {"dtype": "bf16", **precision},
        "data": {
            "train": [str(world / "pairs.jsonl")],
            "max_length": MAX_LENGTH,
            "microbatch_tokens": 1024,
            "global_batch_size": 8,
        },
    }
    file = home / f"{name}.json"
    file.write_text(json.dumps([job(home, name, parts)]))
    status, log = launch(processes, file, devices="cuda")
    assert status == 0, log
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "grad_norm" in row]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_losses_of_one_device(name: str, world: Path, devices: int, tmp_path: Path) -> None:
    processes, parallel, precision = LAYOUTS[name]
    if devices < processes:
        pytest.skip(f"needs {processes} GPUs")
    one = losses(world, tmp_path, "one", 1, {}, precision)
    found = losses(world, tmp_path, name, processes, parallel, precision)
    assert found == pytest.approx(one, abs=TOLERANCE["fp8" if precision else "bf16"])
