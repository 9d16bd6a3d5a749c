"""Steps with a loss or gradient that is not finite: they change no weights on any rank, are counted, and end a run."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.faults.conftest import Zygote
from tests.faults.jobs import STEPS, Job, rows, tensors, training, whole_checkpoints

LAYOUTS = {
    "one": (1, []),
    "dp2": (2, ["parallel.pipeline=1"]),
    "tp2": (2, ["parallel.pipeline=1", "parallel.tensor=2"]),
    "pp2": (2, []),
    "cp2": (2, ["parallel.pipeline=1", "parallel.context=2"]),
    "dp2-overlap": (
        2,
        ["parallel.pipeline=1", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "dp2-plain-optimizer": (2, ["parallel.pipeline=1", "parallel.distributed_optimizer=false"]),
}
SLOW = ("one", "tp2", "cp2", "dp2-overlap", "dp2-plain-optimizer")
# A loss of the last rank, which with a pipeline is the one that has losses; a gradient of the first.
BAD = (2, 4)


def job(layout: str, zygote: Zygote, world: TinyWorld, folder: Path, *more: str) -> Job:
    ranks, overrides = LAYOUTS[layout]
    plain = training(zygote, world, folder, ranks, async_save=False)
    return dataclasses.replace(plain, arguments=[*plain.arguments, *overrides, *more])


def spoilt(ranks: int) -> dict[str, Any]:
    return {"losses": [[BAD[0], ranks - 1]], "gradients": [[BAD[1], 0]]}


def digests(folder: Path, ranks: int) -> list[list[Any]]:
    return [json.loads(line) for rank in range(ranks) for line in (folder / f"digests-{rank}.jsonl").open()]


def bad_batches(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/bad_batches.jsonl").open()]


def strictly(text: str) -> Any:
    """JSON as any other reader than Python's takes it."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_a_bad_step_of_one_rank_leaves_all_weights_and_the_rest_of_the_run_as_if_it_had_been_omitted(
    layout: str, zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    ranks, _ = LAYOUTS[layout]
    bad = job(layout, zygote, world, tmp_path / "bad")
    omitted = job(layout, zygote, world, tmp_path / "omitted")
    statuses, _ = bad.run(spoil=spoilt(ranks))
    assert statuses == [0] * ranks, bad.logs()
    omitted.run(spoil={"omitted": list(BAD)})

    changed = {(step, before != after) for step, before, after in digests(bad.folder, ranks)}
    assert changed == {(step, step not in BAD) for step in range(1, STEPS + 1)}
    found, expected = (tensors(one.folder / f"run/checkpoints/step-{STEPS:08d}") for one in (bad, omitted))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    for line in (bad.folder / "run/metrics.jsonl").open():
        strictly(line)
    log, undisturbed = rows(bad.folder / "run"), rows(omitted.folder / "run")
    counts = {row["step"]: row.pop("bad_steps") for row in log if "bad_steps" in row}
    assert counts == {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    for row, other in zip(log, undisturbed, strict=True):
        other.pop("bad_steps", None)
        if "loss" in row and row["step"] == BAD[0]:
            assert (row["loss"], row["grad_norm"]) == (None, None)
            row["loss"], row["grad_norm"] = other["loss"], other["grad_norm"]
        if "loss" in row and row["step"] == BAD[1]:
            assert row["grad_norm"] is None
            row["grad_norm"] = other["grad_norm"]
        assert row == other

    # Those of all replicas, once each; a checkpoint that is due at a bad step is that of the next.
    first, second = bad_batches(bad.folder)
    assert [len({id_ for part in row["microbatches"] for id_ in part["pairs"]}) for row in (first, second)] == [8, 8]
    assert [sum(len(part["pairs"]) for part in row["microbatches"]) for row in (first, second)] == [8, 8]
    assert [(row["step"], row["loss"] == "nan") for row in (first, second)] == [(2, True), (4, False)]
    assert second["grad_norm"] == "inf"
    # The losses that are told are those of the first rank of a replica.
    assert sum(part["loss"] == "nan" for part in first["microbatches"]) == (layout not in ("tp2", "cp2"))
    assert whole_checkpoints(bad.folder / "run") == [5, 6]
    assert bad.logs().count("step 2 changes no weights: loss nan") == 1


def test_the_count_and_the_pairs_of_bad_steps_are_the_same_after_a_kill(
    zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    plan = {"losses": [[2, 0], [3, 0], [5, 0]]}
    whole, killed = (job("one", zygote, world, tmp_path / name) for name in ("whole", "killed"))
    whole.run(spoil=plan)
    # The checkpoint of step 4 is the newest; step 5 is done again.
    statuses, _ = killed.run({"point": "before a step", "nth": 6, "rank": 0, "signal": int(signal.SIGKILL)}, plan)
    assert statuses == [-signal.SIGKILL]
    assert [row["step"] for row in bad_batches(killed.folder)] == [2, 3, 5]
    killed.run(spoil=plan)
    assert rows(killed.folder / "run") == rows(whole.folder / "run")
    assert bad_batches(killed.folder) == bad_batches(whole.folder)
    assert [row["step"] for row in bad_batches(killed.folder)] == [2, 3, 5]


def test_the_pairs_of_a_bad_step_at_which_the_job_is_asked_to_stop_are_written_down(
    zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    stopped = job("one", zygote, world, tmp_path)
    fault = {"point": "after a row", "nth": 3, "rank": 0, "signal": int(signal.SIGTERM)}
    statuses, _ = stopped.run(fault, {"losses": [[3, 0]]})
    assert statuses == [0]
    assert [row["step"] for row in bad_batches(stopped.folder)] == [3]
    assert whole_checkpoints(stopped.folder / "run")[-1] == 3


@pytest.mark.parametrize("async_save", [pytest.param(False, marks=pytest.mark.slow), True])
def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(
    async_save: bool, zygote: Zygote, world: TinyWorld, tmp_path: Path
) -> None:
    limits = ["trainer.max_bad_steps=2", f"trainer.async_save={async_save}"]
    stopped = job("dp2", zygote, world, tmp_path / "stopped", *limits)
    statuses, _ = stopped.run(spoil={"losses": [[3, 0], [4, 1]]})
    run_dir = stopped.folder / "run"
    # The first to end has it; the other is asked to stop as soon as there is one that has, as by torchrun.
    assert 2 in statuses, stopped.logs()
    assert set(statuses) <= {0, 2}, stopped.logs()
    error = next(line for line in stopped.logs().splitlines() if line.startswith("error: "))
    for part in ("step 4", "2 steps in a row", f"{run_dir}/bad_batches.jsonl", f"{run_dir}/checkpoints/step-00000002"):
        assert part in error
    assert stopped.logs().count("error: ") == 1
    assert whole_checkpoints(run_dir) == [2]
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 3, 4]

    # What it stopped at is good: once nothing is wrong any more, the run ends as one in which nothing ever was.
    stopped.run()
    whole = job("dp2", zygote, world, tmp_path / "whole")
    whole.run()
    assert rows(run_dir) == rows(whole.folder / "run")
    found, expected = (tensors(one.folder / f"run/checkpoints/step-{STEPS:08d}") for one in (stopped, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert bad_batches(stopped.folder) == []
