"""Ranks that hang: the others end in time, and the error names who it was."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults.conftest import Zygote
from tests.faults.jobs import BOUND, STEPS, Job, scoring, training

# Far longer than ranks that work wait for each other, on a machine that does much else.
LIMIT = 15.0
# What a rank that was stopped is given to end.
GRACE = 2.0


def limited(job: Job, *more: str) -> Job:
    return dataclasses.replace(job, arguments=[*job.arguments, *more, f"parallel.timeout_minutes={LIMIT / 60}"])


def stopped_at(point: str, nth: int, rank: int) -> dict[str, Any]:
    return {"point": point, "nth": nth, "rank": rank, "signal": int(signal.SIGSTOP)}


def errors(job: Job) -> list[str]:
    return [line for line in job.logs().splitlines() if line.startswith("error: ")]


def test_a_rank_that_sleeps_is_named_with_its_stack(zygote: Zygote, world: TinyWorld, tmp_path: Path) -> None:
    job = limited(training(zygote, world, tmp_path, 2, async_save=False), "parallel.pipeline=1")
    statuses, seconds = job.run(spoil={"sleeps": [[3, 1]]}, grace=GRACE)
    assert statuses == [1, 1], job.logs()
    assert seconds < BOUND
    (error,) = errors(job)
    for part in ("rank 1 (", ") has not come beyond step 3 for", "_sleep, ", "waiting: rank 0 in "):
        assert part in error
    hang = tmp_path / "run/hang"
    assert str(hang) in error
    sleeper, waiter = ((hang / f"rank-{rank}.txt").read_text() for rank in (1, 0))
    assert "_sleep" in sleeper
    assert "distributed_c10d.py" in waiter
    assert {path.name for path in hang.iterdir()} >= {"flight-record-0.json", "flight-record-1.json"}


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        ("parallel.pipeline=2", 1),
        # The rank that keeps the store of a job without torchrun.
        pytest.param("parallel.pipeline=2", 0, marks=pytest.mark.slow),
        pytest.param("parallel.tensor=2", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_was_stopped_is_named_by_the_others(
    layout: str, rank: int, zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    job = limited(training(zygote, world, tmp_path, 2, async_save=False), "parallel.pipeline=1", layout)
    statuses, _ = job.run(stopped_at("before a step", 3, rank), grace=GRACE)
    assert statuses[rank] == -signal.SIGKILL, job.logs()
    assert statuses[1 - rank] == 1
    (error,) = errors(job)
    assert f"rank {rank}" in error.partition("waiting:")[0]
    assert (tmp_path / f"run/hang/rank-{1 - rank}.txt").exists()


@pytest.mark.slow
def test_a_rank_that_stops_scoring_is_named(zygote: Zygote, world: TinyWorld, tmp_path: Path) -> None:
    job = limited(scoring(zygote, world, tmp_path, 2), "parallel.tensor=2")
    statuses, _ = job.run(stopped_at("before a shard is written", 2, 0), grace=GRACE)
    assert statuses == [-signal.SIGKILL, 1], job.logs()
    assert "rank 0" in errors(job)[0]


@pytest.mark.slow
def test_a_job_whose_ranks_all_work_longer_than_the_limit_ends_well(
    zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    """Steps of three seconds or so each, checkpoints and validations between: nobody waits for long."""
    job = limited(training(zygote, world, tmp_path, 2, async_save=True))
    statuses, seconds = job.run(spoil={"naps": [[step, rank] for step in range(1, STEPS + 1) for rank in (0, 1)]})
    assert statuses == [0, 0], job.logs()
    assert seconds > LIMIT
    assert not (tmp_path / "run/hang").exists()
