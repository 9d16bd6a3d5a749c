"""What cannot be written ends no run: full disks, and folders that go away."""

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel import checkpoint_files, checkpoint_writer
from ctpd_nemo.pipeline import tensorboard
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.checkpointing.runs import STEPS, names, rows, run, same_tensors, sft, step
from tests.pipeline.recipe import composed

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_full_disk_fails_the_save_and_not_the_run(
    world: TinyWorld, whole: Path, small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, async_save: bool
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(small_disk)
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / step(1)).iterdir())
    taken = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - int(2.5 * size)
    (small_disk / "other files").write_bytes(b"\0" * taken)
    overrides = [*sft(world, run_dir), f"trainer.async_save={async_save}"]
    with caplog.at_level(logging.WARNING, "ctpd_nemo"), pytest.raises(InputError, match="MiB free"):
        run(overrides)
    told = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert 0 < len(told) < STEPS
    # Libraries tell it in several ways.
    assert all("No space left" in message or "0.0 MiB free" in message for message in told)
    good = [step(number) for number in range(1, STEPS - len(told) + 1)]
    assert names(run_dir) == good
    assert (small_disk / "latest").read_text() == good[-1] + "\n"
    assert not list(small_disk.glob("*.writing-*"))
    # The run went on to its end, with the same numbers, and counted.
    steps = [row for row in rows(run_dir) if "loss" in row]
    assert [row["loss"] for row in steps] == [row["loss"] for row in rows(whole) if "loss" in row]
    # A save in the background that fails is known a step later, here after the last row.
    assert steps[-1]["failed_checkpoints"] == (0 if async_save else len(told) - 1)
    # With room, it goes on from what it has.
    (small_disk / "other files").unlink()
    run([*overrides, "trainer.keep_last=1"])
    assert names(run_dir) == [step(STEPS)]
    assert same_tensors(run_dir / "checkpoints" / step(4), whole / "checkpoints" / step(4))


class FullFor(Callback):
    """Fills a file system at the start of one step, and makes room at that of another."""

    def __init__(self, disk: Path, first: int, last: int) -> None:
        self.filler, self.first, self.last = disk / "other files", first, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            with self.filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        elif batch_idx == self.last:
            self.filler.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_a_while_costs_a_run_points_of_tensorboard_alone(
    world: TinyWorld, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard, "_RETRY", 0.0)
    run_dir, steps = small_disk / "run", 24
    seldom = ["trainer.epochs=8", f"trainer.max_steps={steps}", "trainer.checkpoint_every=8", "trainer.log_every=1"]
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        train(run_config(composed("train", [*sft(world, run_dir), *seldom])), [FullFor(small_disk, 2, 18)])
    told = [record.getMessage() for record in caplog.records]
    for said in ("heartbeat.json: not written", "rows wait to be written", "left out of TensorBoard", "as of step 8"):
        assert any(said in message for message in told), said
    assert names(run_dir) == [step(steps)]
    assert [row["step"] for row in rows(run_dir) if "loss" in row] == list(range(1, steps + 1))
    drawn = EventAccumulator(str(run_dir / "logs")).Reload().Scalars("loss")
    assert {1, 2, steps} < {point.step for point in drawn}
    assert len(drawn) == len({point.step for point in drawn}) < steps


@pytest.mark.parametrize("when", ["begun", "written"])
def test_a_folder_that_goes_away_during_a_save_fails_the_save_and_not_the_run(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    begin, write_manifest, gone = checkpoint_writer._begin, checkpoint_files.write_manifest, []

    def lose(folder: Path) -> None:
        if not gone:
            gone.append(folder)
            shutil.rmtree(folder.parent)

    def begin_and_lose(final: Path) -> Path:
        writing = begin(final)
        lose(writing)
        return writing

    def lose_and_write(folder: Path) -> None:
        lose(folder)
        write_manifest(folder)

    if when == "begun":
        monkeypatch.setattr(checkpoint_writer, "_begin", begin_and_lose)
    else:
        monkeypatch.setattr(checkpoint_files, "write_manifest", lose_and_write)
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        run(sft(world, tmp_path / "run"))
    (told,) = (record.getMessage() for record in caplog.records if "could not be written" in record.getMessage())
    assert "as of step 1; training goes on" in told
    assert names(tmp_path / "run") == [step(number) for number in range(2, STEPS + 1)]
