"""Steps are exact: every pair once an epoch, whatever the ranks, the workers and the interruptions."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.data.loader import Batching, StepBatch, StepStats, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.errors import InputError

BATCHING = Batching(microbatch_tokens=300)
N_PAIRS = 23


@pytest.fixture
def dataset(
    write_jsonl: Callable[..., Path],
    make_pairs: Callable[..., list[PreferencePair]],
    as_row: Callable[[PreferencePair], dict[str, Any]],
) -> PreferenceDataset:
    rows = [as_row(pair) for pair in make_pairs(N_PAIRS)]
    # One pair that no truncation can fit.
    rows[5]["prompt"][-1]["content"] = "the sea " * 400
    return open_preferences(write_jsonl(rows))


def pairs_of(steps: list[StepBatch]) -> list[int]:
    """Rows of all pairs that these steps saw or left out."""
    seen = [index for step in steps for batch in step.microbatches for index in batch.pair_index.tolist()]
    return seen + [pair.index for step in steps for pair in step.skipped]


FIELDS = [field.name for field in dataclasses.fields(Microbatch) if field.name != "max_seqlen"]


def assert_equal(one: StepBatch, other: StepBatch) -> None:
    """Bit for bit, every buffer included."""
    assert (one.step, one.epoch, one.skipped, one.stats) == (other.step, other.epoch, other.skipped, other.stats)
    for mine, theirs in zip(one.microbatches, other.microbatches, strict=True):
        assert mine.max_seqlen == theirs.max_seqlen
        for name in FIELDS:
            assert getattr(mine, name).equal(getattr(theirs, name)), name


@pytest.mark.parametrize("dp_size", [1, 2, 5])
def test_an_epoch_sees_every_pair_once_over_all_ranks(
    dp_size: int, dataset: PreferenceDataset, encoder: PairEncoder
) -> None:
    plan = StepPlan(N_PAIRS, global_batch_size=4, epochs=2, seed=1)
    ranks = [
        list(build_step_loader(dataset, encoder, plan, BATCHING, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert plan.steps_per_epoch == 6
    for epoch in range(2):
        steps = [step for rank in ranks for step in rank if step.epoch == epoch]
        seen = Counter(pairs_of(steps))
        assert set(seen.values()) == {1}
        assert len(seen) == N_PAIRS
    for number in range(plan.total_steps):
        shares = [rank[number] for rank in ranks]
        assert {share.step for share in shares} == {number}
        assert sorted(pairs_of(shares)) == sorted(plan.batch(number)[1].tolist())
        assert all(share.microbatches for share in shares)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(StepPlan(100, 100, epochs=3, seed=seed).batch(epoch)[1].tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert StepPlan.in_order(10, 4).batch(1)[1].tolist() == [4, 5, 6, 7]
    # The order is part of what a checkpoint means, so it must never change.
    assert StepPlan(8, 8).batch(0)[1].tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_a_loader_put_back_at_any_step_goes_on_as_if_never_stopped(
    dataset: PreferenceDataset, encoder: PairEncoder
) -> None:
    plan = StepPlan(N_PAIRS, global_batch_size=4, epochs=2)
    whole = list(build_step_loader(dataset, encoder, plan, BATCHING))
    assert len(whole) == plan.total_steps == 12
    for start in range(len(whole) + 1):
        loader = build_step_loader(dataset, encoder, plan, BATCHING, start_step=start)
        rest = list(loader)
        assert len(loader) == len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert_equal(one, other)


def test_workers_give_what_the_process_itself_gives(
    dataset: PreferenceDataset,
    encoder: PairEncoder,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    plan = StepPlan(N_PAIRS, global_batch_size=4)
    # Here the tokenizers use threads, which is what they complain about when they are forked.
    alone = list(build_step_loader(dataset, encoder, plan, BATCHING))
    workers = list(build_step_loader(dataset, encoder, plan, BATCHING, num_workers=2))
    assert [step.step for step in workers] == list(range(6))
    for one, other in zip(workers, alone, strict=True):
        assert_equal(one, other)
    assert capfd.readouterr().err == ""


def test_bad_input_in_a_worker_stops_with_the_same_error(dataset: PreferenceDataset, encoder: PairEncoder) -> None:
    plan = StepPlan(N_PAIRS, global_batch_size=4)
    for num_workers in (0, 1):
        loader = build_step_loader(dataset, encoder, plan, BATCHING, scores=NoScores(), num_workers=num_workers)
        with pytest.raises(InputError, match="found no scores; expected a cache of this data"):
            list(loader)


class NoScores:
    def lookup(self, pair: EncodedPair) -> Any:
        raise InputError(f"scores of pair {pair.id!r}", "no scores", "a cache of this data")


def test_a_pair_that_does_not_fit_is_counted_and_the_batch_is_smaller(
    dataset: PreferenceDataset, encoder: PairEncoder
) -> None:
    steps = list(build_step_loader(dataset, encoder, StepPlan.in_order(N_PAIRS, 4), BATCHING))
    assert [step.stats.pairs for step in steps] == [4, 3, 4, 4, 4, 3]
    assert [pair.id for pair in steps[1].skipped] == ["pair-5"]
    total = sum((step.stats for step in steps), StepStats())
    assert total.skipped == {"too_long": 1}
    microbatches = [batch for step in steps for batch in step.microbatches]
    assert total.pairs == sum(batch.num_pairs for batch in microbatches) == N_PAIRS - 1
    assert total.tokens + total.padding == sum(batch.num_tokens for batch in microbatches)
    assert total.response_tokens == sum(int((batch.labels >= 0).sum()) for batch in microbatches)


@pytest.mark.parametrize(
    "batching",
    [
        Batching(300),
        Batching(304, pad_to_multiple=16),
        Batching(304, padding="padded", pad_to_multiple=16),
        Batching(312, sequence_multiple=4, pad_to_multiple=6),
        Batching(312, padding="padded", sequence_multiple=4, pad_to_multiple=6),
        Batching(304, sequence_multiple=8, online=True),
        Batching(300, responses=("chosen",)),
        Batching(300, side="reference"),
        Batching(300, online=True),
    ],
)
def test_microbatches_keep_to_the_budget_and_hold_every_pair(
    batching: Batching, dataset: PreferenceDataset, encoder: PairEncoder
) -> None:
    plan = StepPlan.in_order(N_PAIRS, 12)
    steps = list(build_step_loader(dataset, encoder, plan, batching))
    assert sorted(pairs_of(steps)) == list(range(N_PAIRS))
    for step in steps:
        assert len(step.microbatches) > 1
        for batch in step.microbatches + step.reference_microbatches:
            assert batch.num_tokens <= batching.microbatch_tokens
            assert batch.num_tokens % batching.pad_to_multiple == 0
            assert not (batch.cu_seqlens % batching.sequence_multiple).any()
            assert batch.num_responses == len(batching.responses) * batch.num_pairs
        if batching.online:
            for policy, reference in zip(step.microbatches, step.reference_microbatches, strict=True):
                assert policy.pair_index.equal(reference.pair_index)
                assert policy.span_response.equal(reference.span_response)
                assert not torch.equal(policy.tokens, reference.tokens)
        else:
            assert step.reference_microbatches == []
    if batching.padding == "packed" and batching.whole_multiple == 1:
        assert sum(step.stats.padding for step in steps) == 0


def test_a_rank_without_a_pair_has_a_filler(dataset: PreferenceDataset, encoder: PairEncoder) -> None:
    plan = StepPlan(N_PAIRS, global_batch_size=2)
    batching = Batching(304, pad_to_multiple=16)
    shares = [
        next(iter(build_step_loader(dataset, encoder, plan, batching, dp_rank=rank, dp_size=3))) for rank in range(3)
    ]
    assert [share.microbatches[0].num_pairs for share in shares] == [1, 1, 0]
    assert shares[2].microbatches[0].num_tokens == 16
    assert shares[2].stats == StepStats(padding=16)
    batching = Batching(312, pad_to_multiple=6, sequence_multiple=4)
    loader = build_step_loader(dataset, encoder, plan, batching, dp_rank=2, dp_size=3)
    assert next(iter(loader)).microbatches[0].num_tokens == 12


def test_ranks_share_tokens_evenly(dataset: PreferenceDataset, encoder: PairEncoder) -> None:
    plan = StepPlan.in_order(N_PAIRS, 12)
    ranks = [
        list(build_step_loader(dataset, encoder, plan, BATCHING, dp_rank=rank, dp_size=2))[1].stats.tokens
        for rank in range(2)
    ]
    assert max(ranks) / min(ranks) < 1.1


def test_settings_that_cannot_work_are_refused(dataset: PreferenceDataset, encoder: PairEncoder) -> None:
    plan = StepPlan(N_PAIRS, 4)
    with pytest.raises(InputError, match=r"data\.microbatch_tokens: found 255; expected at least 256"):
        build_step_loader(dataset, encoder, plan, Batching(255))
    with pytest.raises(InputError, match=r"data\.global_batch_size: found 0"):
        StepPlan(N_PAIRS, 0)
    with pytest.raises(ValueError, match="a plan for 22 pairs and a dataset of 23"):
        build_step_loader(dataset, encoder, StepPlan(22, 4), BATCHING)
    with pytest.raises(ValueError, match="data-parallel rank 2 of 2"):
        build_step_loader(dataset, encoder, plan, BATCHING, dp_rank=2, dp_size=2)


def test_max_steps_ends_a_run_early(dataset: PreferenceDataset, encoder: PairEncoder) -> None:
    plan = StepPlan(N_PAIRS, 4, epochs=3, max_steps=7)
    steps = list(build_step_loader(dataset, encoder, plan, BATCHING))
    assert [step.epoch for step in steps] == [0] * 6 + [1]
