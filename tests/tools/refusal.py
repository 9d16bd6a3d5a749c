"""Jobs that are to be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld

Rows = list[dict[str, Any]]


def values(world: TinyWorld, run_dir: Path, **changed: Any) -> DictConfig:
    """A valid job, SFT of the student in three steps, with some of its values changed."""
    job = {
        "method": {"name": "sft"},
        "run_dir": str(run_dir),
        "model": {"student": {"path": str(world.student)}, "teacher": {"path": str(world.teacher)}},
        "data": {
            "train": [str(world.train)],
            "max_length": 64,
            "microbatch_tokens": 256,
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "precision": {"dtype": "fp32"},
    }
    method = changed.pop("method", job["method"])
    merged = OmegaConf.merge(job, changed)
    assert isinstance(merged, DictConfig)
    merged.method = method
    return merged


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(task: Callable[[Any], Any], config: DictConfig, run_dir: Path, may_log: bool = False) -> InputError:
    """The error that a job ends with, once it is sure that it is one line and that nothing was touched.

    ``may_log``: the job had begun to log when it found out.
    """
    before = content(run_dir)
    with pytest.raises(InputError) as error:
        task(run_config(config))
    after = content(run_dir)
    if may_log:
        after = {name: data for name, data in after.items() if not name.startswith("logs/")}
    assert after == before
    assert "\n" not in str(error.value)
    return error.value


def edited(world: TinyWorld, folder: Path, edit: Callable[[Rows], None]) -> Path:
    """The training pairs with something done to them."""
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    edit(rows)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
