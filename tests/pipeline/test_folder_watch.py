"""A run folder that is removed or moved while a job is at work in it."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.folder_watch import FolderWatch
from ctpd_nemo.pipeline.origin import read_config, read_origin, read_starts
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, small_job, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("watch") / "world")


class Meanwhile(Callback):
    """Something that somebody does as a step begins."""

    def __init__(self, step: int, do: Callable[[], Any]) -> None:
        self.step, self.do, self.steps = step, do, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        if trainer.global_step + 1 == self.step:
            self.do()


def run(world: TinyWorld, run_dir: Path, *meanwhile: Callback, **changes: Any) -> Path:
    values = {"trainer.max_steps": 3, "trainer.checkpoint_every": 1} | changes
    more = [f"{key}={value}" for key, value in values.items()]
    return train(run_config(composed("train", small_job(world, run_dir, "sft", *more))), meanwhile)


@pytest.mark.parametrize(
    ("step", "changes"),
    [(1, {"trainer.async_save": True}), (2, {"trainer.checkpoint_every": 0}), (3, {})],
    ids=["while a checkpoint is written", "between checkpoints", "at the last step"],
)
def test_a_job_whose_run_folder_is_removed_ends_in_one_line_and_makes_none(
    world: TinyWorld, step: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """At the end of that step: neither the next checkpoint nor the last metrics make half a folder."""
    folder = tmp_path / "runs" / "run"
    removal = Meanwhile(step, lambda: shutil.rmtree(folder))
    with pytest.raises(InputError) as error:
        run(world, folder, removal, **changes)
    assert error.value.place == str(folder)
    assert error.value.found.startswith(f"no folder any more, at step {step}")
    assert str(error.value).isprintable()
    assert removal.steps == step
    assert not folder.exists()


def test_a_job_whose_run_folder_is_moved_goes_on_from_there(world: TinyWorld, tmp_path: Path) -> None:
    folder, there = tmp_path / "run", tmp_path / "there"
    with pytest.raises(InputError, match="run_dir=THERE goes on"):
        run(world, folder, Meanwhile(2, lambda: folder.rename(there)))
    assert not folder.exists()
    assert [path.name for path in find_checkpoints(there / "checkpoints")] == ["step-00000001"]
    assert run(world, there).name == "step-00000003"
    assert [json.loads(row)["step"] for row in (there / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_record_that_is_removed_is_written_anew_and_the_job_goes_on(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Disks for scratch lose files that nobody has read for long; so does a folder that is made anew under a job."""
    folder = tmp_path / "run"
    kept: list[Any] = []

    def remove() -> None:
        kept.extend([read_config(folder), read_origin(folder), read_starts(folder)])
        shutil.rmtree(folder)
        folder.mkdir()

    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        run(world, folder, Meanwhile(2, remove))
    assert [read_config(folder), read_origin(folder), read_starts(folder)] == kept
    said = [record.getMessage() for record in caplog.records if "written anew" in record.getMessage()]
    assert said == [f"{folder}: the job's record was gone, and is written anew"]
    assert find_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN])
def test_a_folder_that_cannot_be_looked_at_for_a_while_is_no_folder_that_is_gone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_sight(path: Path, **_: Any) -> None:
        raise OSError(number, "not now", str(path))

    watch = FolderWatch(tmp_path / "run", pytest.fail)
    assert watch._is_gone()
    monkeypatch.setattr(Path, "stat", out_of_sight)
    assert not watch._is_gone()
