"""The planner's batches against the data loader's, and what it takes data to be."""

import copy
from pathlib import Path

import numpy as np
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import ModelsConfig, RunConfig, SideConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.sft import SFTConfig
from ctpd_nemo.planner.batches import Cut, cut_batches
from ctpd_nemo.planner.workload import Lengths, SideLengths, Workload, measured_lengths, stated_lengths
from tests.distributed.world import MAX_LENGTH, NUM_PAIRS, build_world

BOTH = ("chosen", "rejected")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over real files with real tokenizers that differ."""
    home = tmp_path_factory.mktemp("world")
    build_world(home)
    models = ModelsConfig(SideConfig(str(home / "student")), SideConfig(str(home / "teacher")))
    run = RunConfig(method=SFTConfig(), model=models)
    run.data.train, run.data.max_length = [str(home / "pairs.jsonl")], MAX_LENGTH
    run.data.microbatch_tokens, run.data.global_batch_size, run.data.num_workers = 3 * MAX_LENGTH, NUM_PAIRS, 0
    return run


def test_measured_lengths_are_what_the_loader_counts(run: RunConfig) -> None:
    lengths = measured_lengths(run, count=100)
    data = RunData(run, BOTH, two_sided=True)
    (step,) = data.train_loader(0, 1, start_step=0)
    student = lengths.sides["student"]
    assert lengths.pairs == NUM_PAIRS
    assert int((2 * student.prompt + student.chosen + student.rejected).sum()) == step.stats.tokens
    assert int((student.chosen + student.rejected).sum()) == step.stats.response_tokens
    assert lengths.mean("teacher") != lengths.mean("student")


def test_measuring_without_files_names_the_key() -> None:
    with pytest.raises(InputError, match=r"data\.train"):
        measured_lengths(RunConfig(method=SFTConfig()), count=10)


def test_stated_means_come_out_of_the_sample() -> None:
    lengths = stated_lengths(Workload(mean_prompt_tokens=100, mean_response_tokens=200, spread=0.5), max_length=10_000)
    assert lengths.mean("student") == pytest.approx(600, rel=0.03)
    cut = stated_lengths(Workload(), max_length=300)
    assert int((cut.sides["student"].prompt + cut.sides["student"].chosen).max()) == 300


@pytest.mark.parametrize("padding", ["packed", "padded"])
@pytest.mark.parametrize("ranks", [1, 4, 64])
def test_no_microbatch_is_over_its_budget_and_no_pair_is_lost(lengths: Lengths, padding: str, ranks: int) -> None:
    cut = Cut("student", BOTH, pairs=16, ranks=ranks, budget=8192, multiple=8, padding=padding)
    (load,) = cut_batches(lengths, cut, steps=4)
    assert load.tokens.max() <= 8192
    assert not (load.tokens % 8).any()
    assert (load.tokens >= load.real_tokens).all()
    assert load.tokens.shape[1] == min(ranks, 16)
    # The same steps on one rank have the same tokens.
    (alone,) = cut_batches(lengths, Cut("student", BOTH, pairs=16, ranks=1, budget=8192), steps=4)
    assert load.real_tokens.sum(axis=(1, 2)).tolist() == alone.real_tokens.sum(axis=(1, 2)).tolist()
    assert load.targets.sum() == alone.targets.sum()


def test_both_sides_of_online_teachers_hold_the_same_pairs() -> None:
    draw = np.random.default_rng(0)
    student, teacher = (SideLengths(*(draw.integers(1, most, 200) for _ in range(3))) for most in (50, 100))
    lengths = Lengths(200, {"student": student, "teacher": teacher}, "drawn")
    loads = cut_batches(lengths, Cut("student", BOTH, pairs=16, ranks=2, budget=400, other="teacher"), steps=3)
    assert [load.tokens.max() <= 400 for load in loads] == [True, True]
    assert (loads[0].counts == loads[1].counts).all()
    assert loads[1].real_tokens.sum() > loads[0].real_tokens.sum()


def test_the_chosen_responses_alone_are_fewer_tokens(lengths: Lengths) -> None:
    (both,) = cut_batches(lengths, Cut("student", BOTH, pairs=16, ranks=1, budget=4096), steps=2)
    (chosen,) = cut_batches(lengths, Cut("student", ("chosen",), pairs=16, ranks=1, budget=4096), steps=2)
    assert 0.4 < chosen.real_tokens.sum() / both.real_tokens.sum() < 0.6


@pytest.mark.parametrize("key", ["pairs", "mean_prompt_tokens", "mean_response_tokens", "spread", "measure"])
def test_impossible_data_is_refused_by_key(key: str) -> None:
    with pytest.raises(InputError, match=f"workload.{key}"):
        Workload(**{key: -1}).check()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_that_only_measuring_needs_is_named_with_what_asks_for_it(run: RunConfig, side: str) -> None:
    run = copy.deepcopy(run)
    getattr(run.model, side).path = "models/not-here"
    with pytest.raises(InputError) as error:
        measured_lengths(run, count=10)
    assert error.value.place == "models/not-here"
    assert error.value.expected.endswith(", as workload.measure tokenizes pairs")


def test_a_file_that_is_not_there_is_named(run: RunConfig, tmp_path: Path) -> None:
    missing = RunConfig(method=SFTConfig(), model=run.model)
    missing.data.train = [str(tmp_path / "none.jsonl")]
    with pytest.raises(InputError, match=r"none\.jsonl"):
        measured_lengths(missing, count=10)
