"""A training job by itself: where it ends, and which changes it does not go on with."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, small_job, small_world
from tests.pipeline.tool import run_tool


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("train") / "world")


def dpo(world: TinyWorld, run_dir: Path) -> list[str]:
    return small_job(world, run_dir, "dpo", "trainer.max_steps=2", "optim.lr=1e-3")


def run(overrides: list[str]) -> Path:
    return train(run_config(composed("train", overrides)))


@pytest.fixture(scope="module")
def trained(world: TinyWorld) -> Path:
    """The run folder of a finished job."""
    run_dir = world.train.parent / "run"
    run(dpo(world, run_dir))
    return run_dir


def test_the_newest_checkpoint_is_returned_and_told(
    world: TinyWorld, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        checkpoint = run(dpo(world, trained))
    assert checkpoint == trained / "checkpoints/step-00000002"
    assert any(record.getMessage() == f"run           checkpoint: {checkpoint}" for record in caplog.records)
    rows = (trained / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2], "a job that is done does nothing"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("optim.lr=1e-2", "optim"),
        ("optim.betas=[0.5,0.6]", "optim"),
        ("trainer.max_steps=3", "steps"),
        ("precision=bf16", "precision"),
        ("method.beta=0.2", "method"),
        ("data.max_length=120", "lengths"),
        ("seed=7", "batches"),
    ],
)
def test_a_run_does_not_go_on_with_other_values(world: TinyWorld, trained: Path, change: str, name: str) -> None:
    with pytest.raises(InputError, match=rf"resume, {name}: found .*; expected what the checkpoint was trained on"):
        run([*dpo(world, trained), change])
    assert len(find_checkpoints(trained / "checkpoints")) == 1


def test_a_run_of_fewer_steps_than_are_done_is_refused(world: TinyWorld, trained: Path) -> None:
    """Also where the number of steps may differ: there is nothing to do, and it would be told as done at step 1."""
    with pytest.raises(InputError, match="resume, steps: found 2 steps that are done; expected at most 1"):
        run([*dpo(world, trained), "trainer.max_steps=1", "resume.allow=[steps]"])


def test_a_run_does_not_go_on_from_other_weights(world: TinyWorld, trained: Path, tmp_path: Path) -> None:
    """DPO measures against the weights it began with."""
    other = Path(shutil.copytree(world.student, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(InputError, match="resume, policy_weights"):
        run([*dpo(world, trained), f"model.student.path={other}"])


def test_a_checkpoint_takes_the_place_of_another_of_its_name(world: TinyWorld, trained: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(again / "checkpoints")
    run([*dpo(world, again), "trainer.checkpoint_every=1", "trainer.keep_last=1"])
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == ["latest", "step-00000002"]


def test_exports_alike_under_torchrun(world: TinyWorld, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints/step-00000002"
    for processes in (1, 2):
        folder = tmp_path / f"export-{processes}"
        arguments = [f"checkpoint={checkpoint}", f"reference={world.student}", f"folder={folder}"]
        status, _, stderr = run_tool("export_hf.py", arguments, tmp_path, processes)
        assert status == 0, stderr
    one, two = (load_file(tmp_path / f"export-{n}" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_second_job_in_a_run_folder_is_refused_and_clears_nothing_away(
    world: TinyWorld, trained: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    writing = run_dir / "checkpoints/step-00000003.writing-0123abcd"
    writing.mkdir()
    lock = run_dir.with_name(".run.lock")
    held = f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{held}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another job at work in it"):
            run(dpo(world, run_dir))
        assert writing.is_dir()
        other.communicate()
    run(dpo(world, run_dir))
    assert not writing.exists()
