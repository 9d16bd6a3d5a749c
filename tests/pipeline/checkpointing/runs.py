"""Jobs of four steps with a checkpoint of each, and what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, small_job

STEPS = 4


def sft(world: TinyWorld, run_dir: Path) -> list[str]:
    """Four steps, with a checkpoint of each, and a validation after the second and the last."""
    return small_job(
        world,
        run_dir,
        "sft",
        f"data.validation=[{world.test}]",
        f"trainer.max_steps={STEPS}",
        "trainer.epochs=2",
        "trainer.checkpoint_every=1",
        "trainer.validate_every=2",
        "trainer.keep_last=10",
        "optim.lr=1e-2",
    )


def run(overrides: list[str]) -> Path:
    return train(run_config(composed("train", overrides)))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and name != "data_wait_share"}
        for row in found
    ]


def names(run_dir: Path) -> list[str]:
    return [path.name for path in find_checkpoints(run_dir / "checkpoints")]


def step(number: int) -> str:
    return f"step-{number:08d}"


def tensor_files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def same_tensors(first: Path, second: Path) -> bool:
    """Weights and optimizer state; objects beside them are pickled, not always to the same bytes."""
    found, expected = (
        {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        for loaded in (dist_checkpointing.load_plain_tensors(str(folder)) for folder in (first, second))
    )
    assert len(expected) > 20
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def cut_back(whole: Path, run_dir: Path, last: int) -> Path:
    """The folder of the same job, after some of its steps."""
    shutil.copytree(whole, run_dir)
    for number in range(last + 1, STEPS + 1):
        shutil.rmtree(run_dir / "checkpoints" / step(number))
    return run_dir
