"""A run done again is the same run: bit for bit where it is deterministic, in one process and in two."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults.conftest import Zygote
from tests.faults.jobs import STEPS, Job, rows, tensors, training

DETERMINISTIC = ["deterministic=true", "parallel.pipeline=1", "trainer.async_save=false"]


def job(zygote: Zygote, world: TinyWorld, folder: Path, ranks: int, *more: str) -> Job:
    """Six steps of DPO; two ranks share the pairs and sum gradients."""
    made = training(zygote, world, folder, ranks, async_save=False)
    return Job(zygote, folder, made.tool, [*made.arguments, *DETERMINISTIC, *more], ranks)


def assert_same(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    mine, theirs = (tensors(folder / f"checkpoints/step-{STEPS:08d}") for folder in (run, other))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 10
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def first(zygote: Zygote, world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    job(zygote, world, folder, 1).run()
    return folder / "run"


def again(zygote: Zygote, first: Path, folder: Path, *more: str, ranks: int = 1) -> Job:
    made = Job(zygote, folder, "train.py", ["--from-run", str(first), f"run_dir={folder / 'run'}", *more], ranks)
    made.run()
    return made


def test_from_run_does_the_same_run_again(zygote: Zygote, first: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    done = again(zygote, first, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before, "it is only read"
    assert_same(done.folder / "run", first)
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (done.folder / "run", first))
    assert config == {**original, "run_dir": str(done.folder / "run"), "from_run": str(first)}
    origins = [json.loads((folder / "origin.json").read_text()) for folder in (done.folder / "run", first)]
    assert origins[0] == {**origins[1], "overrides": [*origins[1]["overrides"], f"run_dir={done.folder / 'run'}"]}
    assert " had " not in done.logs(), "nothing differs"


def test_workers_make_no_difference(zygote: Zygote, first: Path, tmp_path: Path) -> None:
    done = again(zygote, first, tmp_path / "workers", "data.num_workers=2")
    assert_same(done.folder / "run", first)


def test_two_ranks_do_the_same_run_again_beside_the_first(zygote: Zygote, world: TinyWorld, tmp_path: Path) -> None:
    made = job(zygote, world, tmp_path, 2)
    made.run()
    Job(zygote, tmp_path, "train.py", ["--from-run", str(tmp_path / "run")], 2).run()
    assert_same(tmp_path / "run-again", tmp_path / "run")


def test_what_is_not_as_it_was_is_told(zygote: Zygote, first: Path, tmp_path: Path) -> None:
    start: dict[str, Any] = json.loads((first / "starts.jsonl").read_text().splitlines()[-1])
    start["packages"] |= {"torch": "1.0", "apex": "0.1"}
    start |= {"commit": "0" * 40}
    start["fingerprints"]["data"] = "another"
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((first / "config.json").read_bytes())
    (old / "starts.jsonl").write_text(json.dumps(start) + "\n")
    done = again(zygote, old, tmp_path / "again", "trainer.max_steps=1")
    told = [line.partition(": ")[2] for line in done.logs().splitlines() if f"where {old} had" in line]
    names = [line.split(" is ")[0] for line in told]
    assert names == ["torch", "apex", "data", "commit"]
    # What is installed, by its package: torch's own name for itself may say more of the build.
    assert told[0] == f"torch is {version('torch')}, where {old} had 1.0"
    assert told[1] == f"apex is none, where {old} had 0.1"


def test_a_folder_without_a_run_is_one_line_and_status_2(zygote: Zygote, tmp_path: Path) -> None:
    made = Job(zygote, tmp_path, "train.py", ["--from-run", str(tmp_path / "none")], 2)
    statuses, _ = made.run(fault={})
    told = [line for log in tmp_path.glob("rank-*.log") for line in log.read_text().splitlines()]
    expected = "expected the config that a job wrote into its run folder"
    # The first to end has it; the other is asked to stop by then, as by torchrun, maybe before it listens.
    assert 2 in statuses
    assert told == [f"error: {tmp_path}/none/config.json: found no such file; {expected}"]
    assert {path.name for path in tmp_path.iterdir()} <= {"rank-0.log", "rank-1.log"}
