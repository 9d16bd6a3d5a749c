"""Which pairs go together into one microbatch; a function of the arguments alone."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctpd_nemo.errors import InputError


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not under ``length``."""
    return -(-length // multiple) * multiple


def whole_multiple(pad_to_multiple: int, sequence_multiple: int) -> int:
    """What the tokens of a microbatch are a multiple of, where its sequences are multiples of ``sequence_multiple``."""
    return math.lcm(pad_to_multiple, sequence_multiple)


def check_budget(
    budget: int,
    max_length: int,
    pad_to_multiple: int,
    sequence_multiple: int = 1,
    padding: str = "packed",
    place: str = "data.microbatch_tokens",
) -> None:
    """Stop where a pair that passes the length limit could not fit a microbatch; ``place`` names the budget's key.

    Raises:
        InputError: The budget is under two padded sequences of ``max_length``, or no multiple of what microbatches are
            padded to.
    """
    multiple = whole_multiple(pad_to_multiple, sequence_multiple)
    # Packed, the last sequence alone takes the padding of the microbatch; padded, every one does.
    own = sequence_multiple if padding == "packed" else multiple
    least = round_up(2 * round_up(max_length, own), multiple)
    if budget < least:
        raise InputError(place, str(budget), f"at least {least}: two sequences of max_length {max_length}, padded")
    if budget % multiple:
        raise InputError(place, str(budget), f"a multiple of {multiple}, to which microbatches are padded")


def pack(lengths: ArrayLike, budget: int) -> list[list[int]]:
    """Fill microbatches with pairs, first-fit-decreasing: the longest pair first, into the first that has room.

    Args:
        lengths: int ``[n_pairs]``, tokens of each pair, all its sequences together.
        budget: Most tokens of a microbatch.

    Returns:
        Pairs of each microbatch, ascending; every pair is in exactly one.

    Raises:
        ValueError: A pair alone is over the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_fit(lengths, budget)
    room = np.full(len(lengths), budget, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in lengths]
    for pair in _longest_first(lengths):
        # Bins are opened in order, so the first with room is the first opened, or the next fresh one.
        first = int(np.argmax(room >= lengths[pair]))
        room[first] -= lengths[pair]
        bins[first].append(pair)
    return [sorted(members) for members in bins if members]


def pack_padded(lengths: ArrayLike, budget: int) -> list[list[int]]:
    """Fill microbatches whose pairs are all padded to the longest: runs of pairs of like length.

    Args:
        lengths: int ``[n_pairs]``, tokens of each pair once it is padded to its own longest sequence.
        budget: Most tokens of a microbatch, padding included.

    Returns:
        Pairs of each microbatch, ascending; every pair is in exactly one.

    Raises:
        ValueError: A pair alone is over the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_fit(lengths, budget)
    bins: list[list[int]] = []
    longest = 0
    for pair in _longest_first(lengths):
        if not bins or (len(bins[-1]) + 1) * longest > budget:
            bins.append([])
            longest = int(lengths[pair])
        bins[-1].append(pair)
    return [sorted(members) for members in bins]


def _longest_first(lengths: NDArray[np.int64]) -> Sequence[int]:
    return np.argsort(-lengths, kind="stable").tolist()


def _check_fit(lengths: NDArray[np.int64], budget: int) -> None:
    if len(lengths) and lengths.max() > budget:
        raise ValueError(f"a pair of {lengths.max()} tokens is over the budget of {budget}")
