"""The heartbeat file: what it says in each state of a job, how often it is written, and that it stops no run."""

import datetime
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpd_nemo.pipeline import heartbeat
from ctpd_nemo.pipeline.heartbeat import FILE, Heartbeat
from ctpd_nemo.pipeline.pace import Pace
from ctpd_nemo.pipeline.stopping import INTERRUPTED, Stopped


class Job:
    """A trainer that takes its steps on a clock of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int = 0, rank: int = 0) -> None:
        self.now = 1000.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        self.file = folder / FILE
        self.pace = Pace()
        self.heart = Heartbeat(folder, timeout_minutes=30, pace=self.pace)
        self.trainer: Any = SimpleNamespace(
            global_step=step, max_steps=100, is_global_zero=rank == 0, num_predict_batches=[4]
        )
        self.heart.on_train_start(self.trainer, None)

    def step(self, seconds: float) -> None:
        self.heart.on_train_batch_start(self.trainer, None, None, 0)
        self.now += seconds
        self.pace.add(600, seconds)
        self.trainer.global_step += 1
        self.heart.on_train_batch_end(self.trainer, None, None, None, 0)

    def told(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())  # type: ignore[no-any-return]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch, step=40)


def test_a_step_tells_how_far_the_run_is_and_how_long_it_has_left(job: Job, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000040\n")
    for _ in range(10):
        job.step(6.0)
    told = job.told()
    assert (told["state"], told["step"], told["steps"]) == ("training", 50, 100)
    assert told["seconds_left"] == 50 * 6.0, "by what this process has done, over the whole run"
    assert told["tokens_per_second"] == 100.0
    assert told["last_checkpoint"] == str(tmp_path / "checkpoints" / "step-00000040")
    assert told["memory_peak_bytes"] > 2**20
    written = datetime.datetime.fromisoformat(told["time"].replace("Z", "+00:00"))
    assert abs((datetime.datetime.now(datetime.timezone.utc) - written).total_seconds()) < 60


def test_short_steps_are_written_once_a_second(job: Job) -> None:
    written = []
    for _ in range(40):
        job.step(0.1)
        written.append(job.told()["step"])
    assert len(set(written)) <= 5
    assert written[-1] >= 70


def test_every_state_is_told_at_once(job: Job) -> None:
    states = []
    for event in (
        lambda: job.step(0.01),
        lambda: job.heart.on_validation_start(job.trainer, None),
        lambda: job.heart.on_save_checkpoint(job.trainer, None, {}),
        lambda: job.heart.on_train_batch_start(job.trainer, None, None, 0),
        lambda: job.heart.on_predict_start(job.trainer, None),
        lambda: job.heart.end("finished"),
    ):
        event()
        states.append(job.told()["state"])
    assert states == ["training", "validating", "saving", "training", "scoring", "finished"]


def test_shards_are_told_when_scoring(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.heart.pace = None
    scorer: Any = SimpleNamespace(stats=SimpleNamespace(tokens=400))
    monkeypatch.setattr(heartbeat.parallel_state, "get_data_parallel_world_size", lambda: 2)
    job.heart.on_predict_start(job.trainer, scorer)
    job.now += 8.0
    job.heart.on_predict_batch_end(job.trainer, scorer, None, None, batch_idx=0)
    told = job.told()
    assert (told["state"], told["shards_done"], told["shards"]) == ("scoring", 1, 4)
    assert (told["seconds_left"], told["tokens_per_second"]) == (24.0, 100.0)
    assert "step" not in told


def test_a_job_is_stale_once_a_step_takes_ten_times_the_longest(job: Job) -> None:
    assert job.told()["stale_after_seconds"] == 30 * 60, "a first step may take as long as a collective"
    job.step(2.0)
    assert job.told()["stale_after_seconds"] == 60.0
    job.step(20.0)
    job.step(4.0)
    assert job.told()["stale_after_seconds"] == 200.0
    job.heart.on_save_checkpoint(job.trainer, None, {})
    assert job.told()["stale_after_seconds"] == 30 * 60
    job.now += 500.0
    job.step(2.0)
    job.step(2.0)
    assert job.told()["stale_after_seconds"] == 200.0, "the checkpoint was no step"


@pytest.mark.parametrize(
    ("exception", "state", "error"),
    [
        (ValueError("a bug"), "failed", "ValueError: a bug"),
        (Stopped("stopped by SIGTERM"), "stopped", None),
        (Stopped("stopped by Ctrl-C", status=INTERRUPTED), "stopped", None),
        (Stopped("stopped, without its checkpoint", status=1), "failed", "Stopped: 1"),
        (KeyboardInterrupt(), "stopped", None),
    ],
)
def test_the_end_says_how_it_came(job: Job, exception: BaseException, state: str, error: str | None) -> None:
    job.step(2.0)
    job.heart.on_exception(job.trainer, None, exception)
    told = job.told()
    assert (told["state"], told.get("error"), told["step"]) == (state, error, 41)


def test_one_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch, rank=1)
    job.step(2.0)
    job.heart.on_exception(job.trainer, None, ValueError("a bug"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_once_and_stops_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = job.told()
    with monkeypatch.context() as broken:
        broken.setattr(heartbeat.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with caplog.at_level(logging.WARNING, "ctpd_nemo"):
            for _ in range(3):
                job.step(2.0)
    assert len(caplog.records) == 1
    assert job.told() == before, "a reader still finds the last whole one"
    job.step(2.0)
    assert job.told()["step"] == 44


def test_a_damaged_name_of_the_last_checkpoint_stops_nothing(job: Job, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_bytes(b"\xff\xfe\x00step")
    job.step(2.0)
    assert job.told()["step"] == 41
