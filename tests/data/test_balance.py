"""Pairs are shared out completely, evenly, and within the budget."""

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_nemo.data.balance import even_out, split_by_rank
from ctpd_nemo.data.cost import SequenceCost
from ctpd_nemo.data.packing import pack

costs_of_pairs = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000)), max_size=40)


def loads(bins: list[list[int]], values: list[int]) -> list[int]:
    return [sum(values[pair] for pair in members) for members in bins]


def longest_first(costs: list[int], n_ranks: int) -> int:
    """The textbook's greedy split: what its costliest rank costs."""
    load = [0] * n_ranks
    for cost in sorted(costs, reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


@given(costs_of_pairs, st.integers(1, 9))
def test_every_pair_goes_to_one_rank_and_no_move_would_help(pairs: list[tuple[int, int]], n_ranks: int) -> None:
    cost, attention = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ranks = split_by_rank(cost, attention, n_ranks)
    assert len(ranks) == n_ranks
    assert sorted(pair for members in ranks for pair in members) == list(range(len(pairs)))
    assert all(members == sorted(members) for members in ranks)
    load = loads(ranks, cost)
    assert max(load) <= longest_first(cost, n_ranks)
    top = ranks[load.index(max(load))]
    assert max(load) - min(load) <= min((cost[pair] for pair in top if cost[pair]), default=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
def test_costliest_rank_is_within_grahams_bound_of_the_best_split(costs: list[int], n_ranks: int) -> None:
    best = min(
        max(sum(cost for cost, rank in zip(costs, owner, strict=True) if rank == number) for number in range(n_ranks))
        for owner in itertools.product(range(n_ranks), repeat=len(costs))
    )
    found = max(loads(split_by_rank(costs, [cost**2 for cost in costs], n_ranks), costs))
    assert best <= found <= (4 / 3 - 1 / (3 * n_ranks)) * best


def test_equal_tokens_in_long_and_short_sequences_are_shared_out_alike() -> None:
    """Eight pairs of one long sequence and eight of many short ones, all of a cost: each rank has as many of either."""
    attention = [100] * 8 + [1] * 8
    ranks = split_by_rank([10] * 16, attention, 4)
    assert loads(ranks, attention) == [202] * 4


def drawn_lengths(n_pairs: int) -> np.ndarray:
    rng = random.Random(n_pairs)
    return np.array([[min(2000, int(rng.lognormvariate(5.5, 0.8))) for _ in range(2)] for _ in range(n_pairs)])


def test_a_batch_splits_almost_evenly_in_cost_and_more_evenly_in_attention_than_by_cost_alone() -> None:
    lengths_PR = drawn_lengths(128)
    model = SequenceCost(attention=5e-5)
    cost, attention = (
        values.sum(axis=1) for values in (model.of(lengths_PR, lengths_PR), model.query_key_pairs(lengths_PR))
    )

    def imbalance(ranks: list[list[int]], values: np.ndarray) -> float:
        load = loads(ranks, values.tolist())
        return max(load) * len(load) / sum(load)

    both, cost_alone = split_by_rank(cost, attention, 8), split_by_rank(cost, 0 * attention, 8)
    assert imbalance(both, cost) < 1.005
    assert imbalance(both, lengths_PR.sum(axis=1)) < 1.01
    assert imbalance(both, attention) < imbalance(cost_alone, attention)


@given(st.lists(st.tuples(st.integers(2, 100), st.integers(1, 100)), min_size=1, max_size=40), st.integers(100, 300))
def test_microbatches_are_evened_out_without_one_more_and_within_the_budget(
    pairs: list[tuple[int, int]], budget: int
) -> None:
    lengths, attention = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    cost = [2 * length + weight for length, weight in pairs]
    packed = pack(lengths, budget)
    evened = even_out(packed, cost, attention, lengths, budget)
    assert len(evened) == len(packed)
    assert all(evened)
    assert sorted(pair for members in evened for pair in members) == list(range(len(pairs)))
    assert max(loads(evened, lengths)) <= budget
    assert max(loads(evened, cost)) <= max(loads(packed, cost))


def test_leftovers_are_shared_out() -> None:
    """First-fit leaves a microbatch of one pair of 7."""
    lengths = [40, 33, 20, 7, 7]
    packed = pack(lengths, 100)
    assert loads(packed, lengths) == [100, 7]
    evened = even_out(packed, lengths, [length**2 for length in lengths], lengths, 100)
    assert max(loads(evened, lengths)) - min(loads(evened, lengths)) <= 7


def test_a_tight_budget_is_kept_where_pairs_cannot_be_spread() -> None:
    lengths = [60, 50, 40, 30, 20]
    packed = pack(lengths, 100)
    assert len(packed) == 2
    assert loads(even_out(packed, lengths, lengths, lengths, 100), lengths) == [100, 100]
