"""The distillation baselines: loss, gradients and updates of plain PyTorch in any layout, beside the teacher and from
its cache; DSKD's projectors are trained, saved, gone on with, and not exported."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from tests.distributed import plain
from tests.distributed.conftest import Launches
from tests.distributed.distillation_jobs import (
    CONTINUED,
    CUT,
    GRADIENTS,
    SCORED,
    STEPS,
    TRAINED,
    K,
    all_jobs,
    train_plain,
)
from tests.distributed.results import distance, exported, metric_distance, read
from tests.distributed.world import TOLERANCE

PROJECTORS = tuple(f"projectors.{name}.{kind}" for name in ("query", "s2t", "t2s") for kind in ("weight", "bias"))
JOBS = [
    pytest.param(processes, slow, f"{layout}/{name}", marks=[pytest.mark.slow] if slow else [], id=f"{layout}-{name}")
    for (processes, slow), layouts in TRAINED.items()
    for layout, names in layouts.items()
    for name in names
]
CACHES = [
    pytest.param(processes, slow, layout, marks=[pytest.mark.slow] if slow else [], id=layout)
    for (processes, slow), layouts in SCORED.items()
    for layout in layouts
]
AGAIN = [(processes, *layouts) for processes, cases in CONTINUED.items() for layouts in cases]

Folder = Callable[[int, bool], Path]
Expected = Callable[[str], plain.Trained]


@pytest.fixture(scope="module")
def folder(launches: Launches) -> Folder:
    """``folder(processes, slow)``: where the jobs of so many processes are, once they have run."""

    def run(processes: int, slow: bool = False) -> Path:
        if (processes, slow) != (1, False):
            run(1)
        name = f"distillation-{processes}" + "-slow" * slow
        launches.run(name, processes, lambda: all_jobs(launches.home, processes, slow))
        return launches.home / "distillation"

    return run


@pytest.fixture(scope="module")
def expected(launches: Launches) -> Expected:
    """``expected(name)`` trains by plain PyTorch, once."""
    trained = cache(lambda name: train_plain(launches.home, name))
    return lambda name: trained(name.removesuffix("-cache"))


@dataclass(frozen=True)
class Chance:
    """How much of what was trained is decided by rounding: of every step's metrics and gradients, and of the weights.

    An absolute difference of probabilities that are all but equal pulls either way, and what follows follows.
    """

    metrics: list[dict[str, float]]
    gradients: list[dict[str, float]]
    weights: dict[str, float]

    @classmethod
    def between(cls, one: plain.Trained, other: plain.Trained) -> "Chance":
        """Twice what is between all that pulls one way, and all that pulls the other: each may do as it likes."""

        def apart(here: dict[str, Tensor], there: dict[str, Tensor]) -> dict[str, float]:
            return {name: 2 * float((here[name] - there[name]).norm()) for name in here}

        metrics = [
            {name: 2 * abs(here[name] - there[name]) for name in here}
            for here, there in zip(one.metrics, other.metrics, strict=True)
        ]
        gradients = [apart(*pair) for pair in zip(one.gradients, other.gradients, strict=True)]
        return cls(metrics, gradients, apart(one.weights, other.weights))


@pytest.fixture(scope="module")
def chance(launches: Launches, expected: Expected) -> Callable[[str], Chance]:
    """``chance(name)`` trains with what rounding decides decided otherwise, once."""

    @cache
    def of(name: str) -> Chance:
        differences = name.startswith(("uld", "multilevel_ot"))
        flipped = train_plain(launches.home, name, flipped=True) if differences else expected(name)
        return Chance.between(expected(name), flipped)

    return lambda name: of(name.removesuffix("-cache"))


@pytest.mark.parametrize(("processes", "slow", "job"), JOBS)
def test_every_step_has_the_metrics_of_plain_pytorch(
    processes: int, slow: bool, job: str, folder: Folder, expected: Expected, chance: Callable[[str], Chance]
) -> None:
    found, name = read(folder(processes, slow) / job), job.split("/")[1]
    assert metric_distance(found.metrics, expected(name).metrics, chance(name).metrics) < TOLERANCE


@pytest.mark.parametrize(("processes", "slow", "job"), JOBS)
def test_gradients_are_those_of_plain_pytorch(
    processes: int, slow: bool, job: str, folder: Folder, expected: Expected, chance: Callable[[str], Chance]
) -> None:
    """Those of the projectors among them, which tensor-parallel ranks hold bit for bit alike."""
    found, name = read(folder(processes, slow) / job), job.split("/")[1]
    for step in GRADIENTS:
        plainly, either_way = expected(name).gradients[step], chance(name).gradients[step]
        assert distance(found.gradients[step], plainly, either_way) < TOLERANCE


@pytest.mark.parametrize(("processes", "slow", "job"), JOBS)
def test_weights_after_all_steps_are_those_of_plain_adamw(
    processes: int, slow: bool, job: str, folder: Folder, expected: Expected, chance: Callable[[str], Chance]
) -> None:
    path, name = folder(processes, slow) / job, job.split("/")[1]
    weights = dict(expected(name).weights)
    if name == "dskd":
        own = {name: weights.pop(name) for name in PROJECTORS}
        assert distance(_projectors(path), own) < TOLERANCE
    assert distance(exported(path / "export"), weights, chance(name).weights) < TOLERANCE


@pytest.mark.parametrize("name", ["uld", "uld_top_k", "multilevel_ot"])
def test_little_is_left_to_chance(name: str, expected: Expected, chance: Callable[[str], Chance]) -> None:
    """What the comparison is worth."""
    plainly, either_way = expected(name), chance(name)
    for metrics, apart in zip(plainly.metrics, either_way.metrics, strict=True):
        assert all(apart[key] < 0.01 * metrics[key] for key in metrics if key != "lr")
    of_steps = [(plainly.gradients[step], either_way.gradients[step]) for step in GRADIENTS]
    for tensors, off in (*of_steps, (plainly.weights, either_way.weights)):
        assert all(off[key] < 0.01 * float(tensors[key].norm()) for key in tensors)


def test_some_projections_are_right(folder: Folder) -> None:
    """What the comparison is worth: while all are wrong, the divergence in the student's space counts for nothing."""
    accuracies = [row["projection_accuracy"] for row in read(folder(1, False) / "one/dskd").metrics]
    assert accuracies[-1] > 0
    assert accuracies[-1] < 1


def test_teacher_and_student_cut_responses_differently(launches: Launches, folder: Folder) -> None:
    """What the comparison is worth: with equal lengths nothing would be left over."""
    tokens = {}
    for row in pq.read_table(folder(1, False) / "one/cache/top_k-00000.parquet").to_pylist():
        tokens[row["pair_id"]] = len(row["tail"])
    rows = [row for row in plain.read_rows(launches.home / "pairs.jsonl") if row["id"] in tokens]
    assert [len(plain.tokens(launches.home / "student", row, "chosen").response) for row in rows] != list(
        tokens.values()
    )


@pytest.mark.parametrize(("processes", "slow", "layout"), CACHES)
def test_cache_holds_the_largest_log_probs_of_transformers(
    processes: int, slow: bool, layout: str, folder: Folder, launches: Launches
) -> None:
    cached = folder(processes, slow) / layout / "cache"
    teacher = launches.home / "teacher"
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    stored = {
        row["pair_id"]: row
        for file in sorted(cached.glob("top_k-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }
    rows = plain.read_rows(launches.home / "pairs.jsonl")
    assert stored.keys() == {row["id"] for row in rows}
    for row in rows:
        sequence = plain.tokens(teacher, row, "chosen")
        with torch.no_grad():
            logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0]
        every = logits[len(sequence.prompt) - 1 : -1].log_softmax(-1)
        top = every.topk(K)
        found = stored[row["id"]]
        np.testing.assert_allclose(found["logprobs"], top.values.ravel(), rtol=TOLERANCE)
        # Words that are all but equally likely may have changed places.
        words = torch.tensor(found["ids"]).view(-1, K)
        assert all(len(set(row)) == K for row in words.tolist())
        np.testing.assert_allclose(found["logprobs"], every.gather(1, words).ravel(), rtol=TOLERANCE)
        np.testing.assert_allclose(found["tail"], 1 - top.values.exp().sum(-1), atol=TOLERANCE)


@pytest.mark.parametrize(("processes", "source", "target"), AGAIN)
def test_projectors_are_read_back_bit_for_bit(processes: int, source: str, target: str, folder: Folder) -> None:
    path = folder(processes, False) / f"{source}-at-{target}"
    saved, loaded = _projectors(path, CUT), read(path).weights[0]
    assert all(torch.equal(saved[name], loaded[name]) for name in PROJECTORS)


@pytest.mark.parametrize(("processes", "source", "target"), AGAIN)
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    processes: int, source: str, target: str, folder: Folder
) -> None:
    """Bit for bit in the same layout, projectors and their optimizer state included; within rounding in another."""
    home, again = folder(processes, False), f"{source}-at-{target}"
    whole = _end(home / source / "dskd", STEPS - 1)
    for here, there in zip(whole, _end(home / again, STEPS - 1 - CUT), strict=True):
        if source == target:
            assert here.keys() == there.keys()
            assert all(torch.equal(here[name], there[name]) for name in here)
        else:
            # Each is off by rounding.
            assert distance(here, there) < 2 * TOLERANCE


def test_export_of_dskd_is_the_student_alone(folder: Folder, launches: Launches) -> None:
    export = folder(1, False) / "one/dskd/export"
    assert exported(export).keys() == exported(launches.home / "student").keys()
    _, report = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def _end(folder: Path, step: int) -> tuple[dict[str, Tensor], ...]:
    """The gradients of the last step, which was the job's ``step``-th, and the weights behind it."""
    observed = read(folder)
    assert len(observed.metrics) == STEPS
    return observed.gradients[step], exported(folder / "export"), _projectors(folder)


def _projectors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """The projectors in a checkpoint of a run."""
    checkpoint = CheckpointReader(folder / "checkpoints" / f"step-{step:08d}")
    stored, sizes = CheckpointTensors(checkpoint), checkpoint.metadata.state_dict_metadata
    return {name: stored(name, tuple(sizes[name].size)) for name in PROJECTORS}
