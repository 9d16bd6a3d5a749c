"""Sharing out pairs evenly: among data-parallel ranks, and among the microbatches of one rank.

Two things are evened out: the cost of the pairs, which is the time they take, and within it their attention. Where the
first alone were, one rank could have the long sequences and another as many tokens in short ones; attention does not
run at the speed of the matrix products that costs are counted in, and then the two would not be done together.

The answers depend on the arguments alone, so all ranks agree without asking each other.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64Array = NDArray[np.int64]


def split_by_rank(cost: ArrayLike, attention: ArrayLike, n_ranks: int) -> list[list[int]]:
    """Share the pairs of a global batch among data-parallel ranks.

    The costliest rank costs at most what it does where every pair, the costliest first, goes to the rank that has
    least; so at most ``4/3 - 1/(3 n_ranks)`` of the best that any split could do (Graham 1969).

    Args:
        cost: int ``[n_pairs]``, in any unit; 0 for pairs that take no time.
        attention: int ``[n_pairs]``, of which the attention, in a unit of its own.
        n_ranks: Ranks that share them.

    Returns:
        Pairs of each rank, ascending; every pair is at exactly one. A rank has none where pairs are fewer than ranks.
    """
    cost, attention = (np.asarray(values, dtype=np.int64) for values in (cost, attention))
    if n_ranks == 1:
        return [list(range(len(cost)))]
    by_cost = _spread(cost, np.zeros_like(cost), n_ranks)
    assert by_cost is not None
    by_both = _spread(cost, attention, n_ranks)
    assert by_both is not None
    owner = _level(by_both, cost, n_ranks)
    if _load(owner, cost, n_ranks).max() > _load(by_cost, cost, n_ranks).max():
        owner = _level(by_cost, cost, n_ranks)
    return _members(owner, n_ranks)


def even_out(
    bins: list[list[int]], cost: ArrayLike, attention: ArrayLike, lengths: ArrayLike, budget: int
) -> list[list[int]]:
    """Share the pairs of some microbatches out anew, evenly, among as many microbatches of the same budget.

    Args:
        bins: Pairs of each microbatch, each pair in one.
        cost: int ``[n_pairs]``, in any unit, above 0.
        attention: int ``[n_pairs]``, of which the attention, in a unit of its own.
        lengths: int ``[n_pairs]``, tokens of each pair, all its sequences together.
        budget: Most tokens of a microbatch.

    Returns:
        Pairs of each microbatch, ascending; none is empty, and the costliest costs no more than in ``bins``.
    """
    cost, attention, lengths = (np.asarray(values, dtype=np.int64) for values in (cost, attention, lengths))
    if len(bins) < 2:
        return bins
    given = np.empty(len(cost), dtype=np.int64)
    for number, members in enumerate(bins):
        given[members] = number
    owner = _spread(cost, attention, len(bins), lengths, budget)
    if owner is not None:
        owner = _level(owner, cost, len(bins), lengths, budget)
    # Spread out evenly, the last pairs may find no room: then pairs move between the microbatches that there are.
    if owner is None or _load(owner, cost, len(bins)).max() > _load(given, cost, len(bins)).max():
        owner = _level(given, cost, len(bins), lengths, budget)
    return _members(owner, len(bins))


def _spread(
    cost: Int64Array, attention: Int64Array, n_bins: int, lengths: Int64Array | None = None, budget: int = 0
) -> Int64Array | None:
    """The bin of each pair: the costliest pair first, where it adds least to the sum of squared loads of both kinds.

    Without attention that is the bin of the least cost. ``None`` where a pair finds no room.
    """
    loads = np.zeros((2, n_bins))
    # In shares of the whole, so that one kind counts as much as the other.
    shares = np.stack([values / max(1, int(values.sum())) for values in (cost, attention)])
    room = np.full(n_bins, budget, dtype=np.int64)
    owner = np.empty(len(cost), dtype=np.int64)
    for pair in np.argsort(-cost, kind="stable").tolist():
        growth = shares[0, pair] * loads[0] + shares[1, pair] * loads[1]
        if lengths is not None:
            growth[room < lengths[pair]] = np.inf
        best = int(np.argmin(growth))
        if np.isinf(growth[best]):
            return None
        owner[pair] = best
        loads[:, best] += shares[:, pair]
        if lengths is not None:
            room[best] -= lengths[pair]
    return owner


def _level(
    owner: Int64Array, cost: Int64Array, n_bins: int, lengths: Int64Array | None = None, budget: int = 0
) -> Int64Array:
    """Move or swap pairs of the costliest bin, as long as that bin and the other one both end below what it cost."""
    n_pairs = len(owner)
    # Behind the pairs stands an empty one in every bin: swapped with it, a pair is moved.
    owner = np.concatenate([owner, np.arange(n_bins)])
    cost = np.concatenate([cost, np.zeros(n_bins, dtype=np.int64)])
    sizes = np.zeros_like(cost)
    if lengths is not None:
        sizes[:n_pairs] = lengths
    for _ in range(n_pairs):
        load, filled = _load(owner, cost, n_bins), _load(owner, sizes, n_bins)
        top = int(np.argmax(load))
        own, other = np.flatnonzero(owner[:n_pairs] == top), np.flatnonzero(owner != top)
        less = cost[own, None] - cost[other]
        after = np.maximum(load[top] - less, load[owner[other]] + less)
        if lengths is not None:
            shift = sizes[own, None] - sizes[other]
            fits = (filled[owner[other]] + shift <= budget) & (filled[top] - shift <= budget)
            after = np.where(fits, after, load[top])
        if not after.size or after.min() >= load[top]:
            break
        mine, theirs = (int(choice) for choice in np.unravel_index(np.argmin(after), after.shape))
        mine, theirs = own[mine], other[theirs]
        owner[mine] = owner[theirs]
        if theirs < n_pairs:
            owner[theirs] = top
    return owner[:n_pairs]


def _load(owner: Int64Array, values: Int64Array, n_bins: int) -> Int64Array:
    load = np.zeros(n_bins, dtype=np.int64)
    np.add.at(load, owner, values)
    return load


def _members(owner: Int64Array, n_bins: int) -> list[list[int]]:
    return [np.flatnonzero(owner == number).tolist() for number in range(n_bins)]
