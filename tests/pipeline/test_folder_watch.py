"""A run folder, or a cache, that is removed or moved while a job is at work in it."""

import errno
import itertools
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.scorer import Scorer
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.parallel.hang import HangWatch
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.failures import fail
from ctpd_nemo.pipeline.folder_watch import kept_run_folder
from ctpd_nemo.pipeline.origin import read_config, read_origin, read_starts
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_cache import is_whole
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.run_folder import make_run_folder
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_job, small_world


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

    kept = kept_run_folder(tmp_path / "run", "", None)
    assert kept.is_gone()
    monkeypatch.setattr(Path, "stat", out_of_sight)
    assert not kept.is_gone()


# Scoring


@dataclass
class Scoring:
    """A scoring job: three models, one after the other, and three shards of each; with its folders."""

    world: TinyWorld
    run_dir: Path
    cache: Path

    def run(self, *more: str) -> Path:
        overrides = [
            f"model.student.path={self.world.student}",
            f"model.teacher.path={self.world.teacher}",
            f"data.train={self.world.train}",
            f"run_dir={self.run_dir}",
            f"method.cache={self.cache}",
            "method.pairs_per_shard=10",
            "method.together=false",
            *(f"method.{role}={self.world.teacher}" for role in ("reference", "positive", "negative")),
            *SMALL_BATCHES,
            *more,
        ]
        return score(run_config(composed("score", overrides)))


@pytest.fixture
def scoring(world: TinyWorld, tmp_path: Path) -> Scoring:
    return Scoring(world, tmp_path / "runs" / "run", tmp_path / "caches" / "cache")


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, Callable[[], Any]], None]:
    """Has something done as a method of ``Scorer`` is called for the nth time, before its work is done."""

    def hook(name: str, number: int, do: Callable[[], Any]) -> None:
        method, calls = getattr(Scorer, name), itertools.count(1)

        def called(self: Scorer, *arguments: Any) -> Any:
            if next(calls) == number:
                do()
            return method(self, *arguments)

        monkeypatch.setattr(Scorer, name, called)

    return hook


Hook = Callable[[str, int, Callable[[], Any]], None]


@pytest.mark.parametrize(
    ("moment", "number", "at", "removed"),
    [
        ("predict_step", 1, "shard 0", "run_dir"),
        ("predict_step", 1, "shard 0", "cache"),
        ("configure_model", 2, "the first shard", "run_dir"),
        ("configure_model", 2, "the first shard", "cache"),
        ("transfer_batch_to_device", 5, "shard 1", "run_dir with the cache in it"),
        ("predict_step", 9, "shard 2", "run_dir"),
        ("predict_step", 9, "shard 2", "cache"),
    ],
)
def test_a_scoring_job_whose_folder_is_removed_ends_in_one_line_and_makes_none(
    moment: str, number: int, at: str, removed: str, scoring: Scoring, meanwhile: Hook
) -> None:
    if "with" in removed:
        scoring.cache = scoring.run_dir / "cache"
    gone = scoring.cache if removed == "cache" else scoring.run_dir
    meanwhile(moment, number, lambda: shutil.rmtree(gone))
    with pytest.raises(InputError) as error:
        scoring.run(*(["method.top_k=3"] if number == 1 else []))
    assert error.value.place == str(gone)
    assert error.value.found == f"no folder any more, at {at}: removed or moved while a job was at work in it"
    assert ("method.cache" if removed == "cache" else "run_dir") + "=THERE goes on" in error.value.expected
    assert str(error.value).isprintable()
    assert not gone.exists()


def test_a_scoring_job_whose_cache_is_moved_goes_on_from_there(scoring: Scoring, meanwhile: Hook) -> None:
    there = scoring.cache.with_name("there")
    meanwhile("predict_step", 5, lambda: scoring.cache.rename(there))
    with pytest.raises(InputError, match=r"method\.cache=THERE goes on from its shards"):
        scoring.run()
    done = {path: path.stat().st_mtime_ns for path in there.glob("*.parquet")}
    assert len(done) == 4
    scoring.cache = there
    scoring.run()
    assert len(list(there.glob("*.parquet"))) == 9
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_what_says_what_a_cache_holds_is_written_anew_and_the_job_goes_on(
    scoring: Scoring, meanwhile: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    kept: dict[Path, bytes] = {}

    def remove() -> None:
        for path in [*scoring.cache.glob("*.json"), scoring.run_dir / "config.json"]:
            kept[path] = path.read_bytes()
            path.unlink()

    meanwhile("predict_step", 2, remove)
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        scoring.run("method.top_k=3")
    assert len(kept) == 3
    assert {path: path.read_bytes() for path in kept} == kept
    said = {record.getMessage() for record in caplog.records if "written anew" in record.getMessage()}
    assert said == {
        f"{scoring.run_dir}: the job's record was gone, and is written anew",
        f"{scoring.cache}: the manifest was gone, and is written anew",
        f"{scoring.cache}: the manifest of top_k was gone, and is written anew",
    }
    assert is_whole(scoring.cache)


def test_a_scoring_job_that_misses_shards_at_its_end_says_so_and_makes_them_anew(
    scoring: Scoring, meanwhile: Hook
) -> None:
    def empty() -> None:
        shutil.rmtree(scoring.cache)
        scoring.cache.mkdir()

    meanwhile("predict_step", 6, empty)
    with pytest.raises(InputError) as error:
        scoring.run()
    assert (error.value.place, error.value.found) == (
        str(scoring.cache),
        "5 shards less than were written into it",
    )
    assert not is_whole(scoring.cache)
    scoring.run()
    assert is_whole(scoring.cache)


def test_no_rank_that_fails_or_hangs_makes_a_run_folder_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the others do when one rank has ended; before a job has a folder, what they leave there makes it."""
    folder = tmp_path / "runs" / "run"
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    watch = HangWatch(None, 1, 2, folder / "hang", 60.0)
    fail(RuntimeError("connection closed"), str(folder))
    watch._write_stacks()
    assert sorted(path.name for path in folder.iterdir()) == ["hang", "logs"]
    make_run_folder(folder)
    shutil.rmtree(folder)
    fail(RuntimeError("connection closed"), str(folder))
    watch._write_stacks()
    assert not folder.exists()
