"""Jobs killed at any moment: what goes on ends as if nothing had happened, and nothing by halves is taken."""

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from ctpd_nemo.pipeline.stopping import INTERRUPTED
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults import points
from tests.faults.conftest import Account, Zygote
from tests.faults.jobs import (
    BOUND,
    STEPS,
    Job,
    one_stage,
    rows,
    scoring,
    steps_done,
    tensors,
    training,
    whole_checkpoints,
)

# Of the moments; another one draws others.
SEED = int(os.environ.get("CTPD_FAULTS_SEED", "20251125"))


class Undisturbed:
    """Jobs that were never killed, by what they are; each runs once."""

    def __init__(self, home: Path, zygote: Zygote, world: TinyWorld) -> None:
        self._home, self._zygote, self._world = home, zygote, world

    def training(self, ranks: int) -> Path:
        """Its run folder: how checkpoints are written makes no difference."""
        folder = self._home / f"training-{ranks}"
        if not folder.exists():
            training(self._zygote, self._world, folder, ranks, async_save=False).run()
        return folder / "run"

    def scoring(self, ranks: int) -> Path:
        folder = self._home / f"scoring-{ranks}"
        if not folder.exists():
            scoring(self._zygote, self._world, folder, ranks).run()
        return folder / "cache"

    def stage(self, ranks: int) -> Path:
        folder = self._home / f"stage-{ranks}"
        if not folder.exists():
            one_stage(self._zygote, self._world, folder, ranks).run()
        return folder / "run/sft_student"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, world: TinyWorld) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), zygote, world)


def at(point: str, nth: int = 1, rank: int = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
    return {"point": point, "nth": nth, "rank": rank, "signal": int(number)}


def killed(job: Job, fault: dict[str, Any], account: Account) -> bool:
    """Run a job into a fault; whether it came to it."""
    statuses, seconds = job.run(fault)
    assert seconds < BOUND, f"ranks went on waiting for one that was killed: {fault}"
    if -signal.SIGKILL not in statuses:
        assert not any(statuses), f"{statuses}\n{job.logs()}"
        return False
    where = fault.get("point") or f"{fault['seconds']:.2f} s"
    ranks = f"rank {fault['rank']}" if "rank" in fault else f"ranks {fault['aimed_at']}"
    nth = f", {fault['nth']}" if "nth" in fault else ""
    account.killed.append(f"{job.tool}, {job.ranks} ranks, {ranks}: {where}{nth}")
    return True


def check_training(job: Job, expected: Path, account: Account) -> None:
    """Go on, and compare; nothing but steps since the last checkpoint is done again."""
    run_dir = job.folder / "run"
    before, done = whole_checkpoints(run_dir), steps_done(run_dir)
    job.run()
    account.steps_again.append(done - max(before, default=0))
    assert rows(run_dir) == rows(expected)
    # A job that was asked to stop has a checkpoint of whichever step that was.
    kept = whole_checkpoints(run_dir)
    assert len(kept) == 2
    assert kept[-1] == STEPS
    assert {path.name for path in (run_dir / "checkpoints").glob("*.*")} == set()
    found, there = (tensors(folder / f"checkpoints/step-{STEPS:08d}") for folder in (run_dir, expected))
    assert found.keys() == there.keys()
    assert all(torch.equal(found[name], there[name]) for name in there)


def train_through(
    job: Job, faults: list[dict[str, Any]], undisturbed: Undisturbed, account: Account, must: bool = True
) -> None:
    for fault in faults:
        came = killed(job, fault, account)
        assert came or not must, f"{fault} was never met\n{job.logs()}"
    check_training(job, undisturbed.training(job.ranks), account)


# A few moments of each kind, in every run of the tests


@pytest.mark.parametrize(
    ("ranks", "async_save", "fault"),
    [
        (1, False, at("in a tensor file", 5)),
        (1, True, at("after the sums", 2)),
        (2, False, at("before the sums", 2, rank=1)),
        (2, True, at("beside a tensor file", 5, rank=1)),
        (2, True, at("after the manifest", 2)),
    ],
    ids=lambda value: value["point"].replace(" ", "-") if isinstance(value, dict) else str(value),
)
def test_training_that_is_killed_goes_on_bit_for_bit(
    ranks: int,
    async_save: bool,
    fault: dict[str, Any],
    zygote: Zygote,
    world: TinyWorld,
    undisturbed: Undisturbed,
    account: Account,
    tmp_path: Path,
) -> None:
    train_through(training(zygote, world, tmp_path, ranks, async_save), [fault], undisturbed, account)


@pytest.mark.parametrize(("ranks", "async_save", "targets"), [(1, False, [0]), (2, True, [0, 1])])
def test_sigterm_ends_with_a_checkpoint_and_status_0(
    ranks: int,
    async_save: bool,
    targets: list[int],
    zygote: Zygote,
    world: TinyWorld,
    undisturbed: Undisturbed,
    account: Account,
    tmp_path: Path,
) -> None:
    job = training(zygote, world, tmp_path, ranks, async_save)
    stop_and_go_on(job, job.folder / "run/metrics.jsonl", 1, targets, undisturbed, account)


@pytest.mark.parametrize(
    ("ranks", "workers", "number"), [(1, 1, signal.SIGINT), (2, 0, signal.SIGINT), (1, 1, signal.SIGTERM)]
)
def test_a_signal_to_every_process_of_a_job_ends_it_with_a_checkpoint(
    ranks: int,
    workers: int,
    number: int,
    zygote: Zygote,
    world: TinyWorld,
    undisturbed: Undisturbed,
    account: Account,
    tmp_path: Path,
) -> None:
    """As a terminal sends Ctrl-C, and some schedulers SIGTERM; here while a checkpoint is written in the background."""
    job = training(zygote, world, tmp_path, ranks, async_save=True)
    job.arguments.append(f"data.num_workers={workers}")
    log, targets = job.folder / "run/metrics.jsonl", list(range(ranks))
    stop_and_go_on(job, log, 2, targets, undisturbed, account, {"signal": int(number), "group": True})


def stop_and_go_on(
    job: Job,
    log: Path,
    lines: int,
    targets: list[int],
    undisturbed: Undisturbed,
    account: Account,
    how: dict[str, Any] | None = None,
) -> None:
    """SIGTERM unless ``how`` says otherwise."""
    fault = {"file": str(log), "lines": lines, "targets": targets, "signal": int(signal.SIGTERM), **(how or {})}
    statuses, seconds = job.run(dict(fault))
    if fault["signal"] == signal.SIGINT:
        # Once one has ended so, the others are asked to.
        assert INTERRUPTED in statuses, f"{statuses}\n{job.logs()}"
        assert "stopped by Ctrl-C at step" in job.logs()
        assert set(statuses) <= {0, INTERRUPTED}, f"{statuses}\n{job.logs()}"
    else:
        assert not any(statuses), f"{statuses}\n{job.logs()}"
    assert seconds < BOUND
    run_dir = job.folder / "run"
    done = steps_done(run_dir)
    assert max(whole_checkpoints(run_dir)) == done, "the step that was done last has a checkpoint"
    account.stopped.append(seconds)
    check_training(job, undisturbed.training(job.ranks), account)


@pytest.mark.parametrize(("ranks", "fault"), [(1, at("in a shard", 4)), (2, at("before a shard is written", 2, 1))])
def test_scoring_that_is_killed_repeats_one_shard_at_most(
    ranks: int,
    fault: dict[str, Any],
    zygote: Zygote,
    world: TinyWorld,
    undisturbed: Undisturbed,
    account: Account,
    tmp_path: Path,
) -> None:
    score_through(scoring(zygote, world, tmp_path, ranks), fault, undisturbed, account)


def score_through(
    job: Job, fault: dict[str, Any], undisturbed: Undisturbed, account: Account, must: bool = True
) -> None:
    cache = job.folder / "cache"
    came = killed(job, fault, account)
    assert came or not must, f"{fault} was never met\n{job.logs()}"
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.parquet")}
    job.run()
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.parquet")}
    # A shard has a file for each of the two models; it is done when both are there.
    again = {name.split("-")[1] for name, written in before.items() if after[name] != written}
    assert len(again) <= job.ranks, f"each replica was in one shard; written again: {again}"
    for number in again:
        assert sum(name.endswith(number) for name in before) == 1, f"{number} was whole and was written again"
    expected = undisturbed.scoring(job.ranks)
    names = sorted(path.name for path in expected.glob("*.parquet"))
    assert sorted(after) == names
    for name in names:
        assert pq.read_table(cache / name).to_pydict() == pq.read_table(expected / name).to_pydict()
    account.shards_again.append(len(again))


def test_a_stage_that_is_killed_in_its_export_leaves_none(
    zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    stage_through(
        one_stage(zygote, world, tmp_path, 1), at("before an export has its name"), undisturbed, account, export=False
    )


def stage_through(
    job: Job,
    fault: dict[str, Any],
    undisturbed: Undisturbed,
    account: Account,
    export: bool | None = None,
    must: bool = True,
) -> None:
    came = killed(job, fault, account)
    assert came or not must, f"{fault} was never met\n{job.logs()}"
    stage = job.folder / "run/sft_student"
    expected = undisturbed.stage(job.ranks)
    assert export is None or (stage / "export").exists() == export
    if (stage / "export").exists():
        assert exported(stage) == exported(expected)
    whole_checkpoints(stage)
    job.run()
    assert rows(stage) == rows(expected)
    assert exported(stage) == exported(expected)
    assert not list(stage.glob(".export*"))


def exported(stage: Path) -> dict[str, bytes]:
    # The card and its record name the run's own folders.
    files = (path for path in (stage / "export").iterdir() if path.name not in ("README.md", "ctpd_nemo.json"))
    return {path.name: path.read_bytes() for path in files}


# All of them


def _many() -> list[tuple[int, bool, list[dict[str, Any]]]]:
    """Every point of training and saving, on one rank and on a random one of two, at a random time of several."""
    draw = random.Random(SEED)
    cases: list[tuple[int, bool, list[dict[str, Any]]]] = []
    for ranks in (1, 2):
        for point in (*points.TRAINING, *points.SAVING, *points.COMPLETING):
            rank = draw.randrange(ranks) if point not in points.COMPLETING else 0
            nth = draw.randint(1, 8 if "rename" in point else 3)
            faults = [at(point, nth, rank)]
            if point == "in a log that is cut back":
                faults = [at("after a row", 3), at(point, 1, 0)]
            cases.append((ranks, draw.random() < 0.5, faults))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "async_save", "faults"),
    _many(),
    ids=lambda value: value[-1]["point"].replace(" ", "-") if isinstance(value, list) else str(value),
)
def test_training_that_is_killed_anywhere_goes_on_bit_for_bit(
    ranks: int,
    async_save: bool,
    faults: list[dict[str, Any]],
    zygote: Zygote,
    world: TinyWorld,
    undisturbed: Undisturbed,
    account: Account,
    tmp_path: Path,
) -> None:
    train_through(training(zygote, world, tmp_path, ranks, async_save), faults, undisturbed, account)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_training_that_is_killed_at_a_random_time_and_again_goes_on_bit_for_bit(
    number: int, zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    draw = random.Random(SEED + number)
    ranks = 1 + number % 2
    job = training(zygote, world, tmp_path, ranks, async_save=draw.random() < 0.5)
    undisturbed.training(ranks)
    seconds = training(zygote, world, tmp_path / "timed", ranks, async_save=False).run()[1]
    faults = [at_time(draw.uniform(0.2, 1.0) * seconds, draw, ranks) for _ in range(2)]
    train_through(job, faults, undisturbed, account, must=False)


def at_time(seconds: float, draw: random.Random, ranks: int) -> dict[str, Any]:
    target = draw.randrange(ranks)
    return {"seconds": seconds, "targets": [target], "aimed_at": [target], "signal": int(signal.SIGKILL)}


@pytest.mark.slow
@pytest.mark.parametrize("lines", range(1, STEPS + 1))
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_at_any_step_ends_with_a_checkpoint(
    lines: int, ranks: int, zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    """In one process of two alone, too: all stop at the same step."""
    targets = [lines % ranks] if lines % 2 else list(range(ranks))
    job = training(zygote, world, tmp_path, ranks, async_save=lines > 3)
    stop_and_go_on(job, job.folder / "run/metrics.jsonl", lines, targets, undisturbed, account)


@pytest.mark.slow
@pytest.mark.parametrize("point", points.SCORING)
@pytest.mark.parametrize("ranks", [1, 2])
def test_scoring_that_is_killed_anywhere_repeats_one_shard_at_most(
    point: str, ranks: int, zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED}{point}{ranks}")
    fault = at(point, draw.randint(1, 5), draw.randrange(ranks))
    score_through(scoring(zygote, world, tmp_path, ranks), fault, undisturbed, account)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_scoring_that_is_asked_to_stop_ends_between_shards(
    ranks: int, zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    job = scoring(zygote, world, tmp_path, ranks)
    statuses, seconds = job.run(at("after a shard", 3, 0, signal.SIGTERM))
    account.stopped.append(seconds)
    assert statuses[0] == 0, job.logs()
    assert 3 <= len(list((job.folder / "cache").glob("*.parquet"))) < 12
    score_through(job, at("in a shard", 100), undisturbed, account, must=False)


@pytest.mark.slow
@pytest.mark.parametrize("point", [*points.EXPORTING, "before a rename", "after a rename"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stage_that_is_killed_anywhere_goes_on(
    point: str, ranks: int, zygote: Zygote, world: TinyWorld, undisturbed: Undisturbed, account: Account, tmp_path: Path
) -> None:
    nth = 2 if "complete" in point else 1
    if "rename" in point:
        nth = random.Random(f"{SEED}{point}{ranks}").randint(1, 12)
    stage_through(one_stage(zygote, world, tmp_path, ranks), at(point, nth), undisturbed, account)


@pytest.mark.slow
def test_a_pipeline_that_is_killed_again_and_again_ends_as_one_that_was_not(
    zygote: Zygote, world: TinyWorld, account: Account, tmp_path: Path
) -> None:
    from tests.pipeline.recipe import recipe

    def whole(folder: Path) -> Job:
        return Job(zygote, folder, "pipeline.py", recipe(world, folder / "run"), 1)

    seconds = whole(tmp_path / "never").run()[1]
    job, draw, ended = whole(tmp_path / "killed"), random.Random(SEED), False
    for _ in range(12):
        ended = ended or not killed(job, at_time(draw.uniform(0.2, 0.8) * seconds, draw, 1), account)
        for stage in (job.folder / "run").glob("*/checkpoints"):
            whole_checkpoints(stage.parent)
    job.run()
    for stage in ("sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "dpo_student", "ctpd"):
        found, expected = (folder / "run" / stage for folder in (job.folder, tmp_path / "never"))
        assert rows(found) == rows(expected), stage
        assert exported(found) == exported(expected), stage
    shutil.rmtree(tmp_path / "never")
