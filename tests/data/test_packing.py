"""Packing loses nothing, wastes little, and is the same everywhere."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.data.packing import check_budget, pack, pack_padded
from ctpd_nemo.errors import InputError

lengths_of_pairs = st.lists(st.integers(2, 100), max_size=60)


def first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    """The textbook's loop."""
    bins: list[list[int]] = []
    for pair in sorted(range(len(lengths)), key=lambda pair: (-lengths[pair], pair)):
        for members in bins:
            if sum(lengths[member] for member in members) + lengths[pair] <= budget:
                members.append(pair)
                break
        else:
            bins.append([pair])
    return [sorted(members) for members in bins]


@given(lengths_of_pairs, st.integers(100, 300))
def test_pack_is_first_fit_decreasing(lengths: list[int], budget: int) -> None:
    assert pack(lengths, budget) == first_fit_decreasing(lengths, budget)


@given(lengths_of_pairs, st.integers(100, 300))
def test_every_pair_is_packed_once_and_within_the_budget(lengths: list[int], budget: int) -> None:
    packed, padded = pack(lengths, budget), pack_padded(lengths, budget)
    for bins in (packed, padded):
        assert sorted(pair for members in bins for pair in members) == list(range(len(lengths)))
    assert all(sum(lengths[pair] for pair in members) <= budget for members in packed)
    assert all(len(members) * max(lengths[pair] for pair in members) <= budget for members in padded)


def test_packing_wastes_little() -> None:
    rng = random.Random(0)
    lengths = [min(2000, int(rng.lognormvariate(6, 0.7))) for _ in range(2000)]
    bins = pack(lengths, 4096)
    assert sum(lengths) / (4096 * len(bins)) > 0.99
    assert len(bins) <= math.ceil(sum(lengths) / 4096) + 1


def test_a_pair_over_the_budget_is_an_error() -> None:
    for way in (pack, pack_padded):
        with pytest.raises(ValueError, match="a pair of 11 tokens is over the budget of 10"):
            way([3, 11], 10)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (199, "found 199; expected at least 200: two sequences of max_length 100, padded"),
        (209, "found 209; expected a multiple of 8"),
    ],
)
def test_a_budget_that_cannot_hold_a_longest_pair_is_refused(budget: int, message: str) -> None:
    with pytest.raises(InputError, match=rf"data\.microbatch_tokens: {message}"):
        check_budget(budget, max_length=100, pad_to_multiple=8)
    check_budget(200, max_length=100, pad_to_multiple=8)
    with pytest.raises(InputError, match="found 200; expected at least 208"):
        check_budget(200, max_length=100, pad_to_multiple=8, padding="padded")
    check_budget(216, max_length=100, pad_to_multiple=6, sequence_multiple=4)
    with pytest.raises(InputError, match="found 220; expected a multiple of 12"):
        check_budget(220, max_length=100, pad_to_multiple=6, sequence_multiple=4)


def test_microbatches_that_are_all_filled_up_hold_a_longest_pair() -> None:
    """What overlapped tensor parallelism asks for: the budget is the multiple."""
    check_budget(256, max_length=128, pad_to_multiple=256)
    check_budget(256, max_length=127, pad_to_multiple=256, sequence_multiple=4)
