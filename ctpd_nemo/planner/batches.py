"""The microbatches of some steps, packed and shared out as the data loader does it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.balance import even_out, split_by_rank
from ctpd_nemo.data.cost import SequenceCost
from ctpd_nemo.data.packing import pack, pack_padded, round_up, whole_multiple
from ctpd_nemo.planner.shapes import shape_of
from ctpd_nemo.planner.workload import Lengths

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
# Steps that stand for all of them.
STEPS = 16
_SEED = 1


@dataclass(frozen=True)
class Cut:
    """How the pairs of a step become microbatches.

    Attributes:
        side: Whose tokens: "student" or "teacher".
        responses: Both responses of a pair, or the chosen one alone.
        pairs: Pairs of a step, over all ranks.
        ranks: Ranks that share them.
        budget: Most tokens of a microbatch.
        multiple: Tokens of a microbatch are a multiple of this.
        sequence_multiple: Likewise those of a sequence.
        padding: "packed" or "padded".
        other: The side whose microbatches hold the same pairs, where there is one.
        attention: "fused" computes what tokens see; "local" pads sequences to the longest of the microbatch, and
            computes all of it.
        cost: What sequences cost, as the loader counts it to share them out; its window is what tokens see.
        context: Context-parallel size.
    """

    side: str
    responses: tuple[str, ...]
    pairs: int
    ranks: int
    budget: int
    multiple: int = 1
    sequence_multiple: int = 1
    padding: str = "packed"
    other: str | None = None
    attention: str = "fused"
    cost: SequenceCost = field(default_factory=SequenceCost)
    context: int = 1

    @property
    def whole_multiple(self) -> int:
        """What the tokens of a microbatch are a multiple of: both."""
        return whole_multiple(self.multiple, self.sequence_multiple)


@dataclass(frozen=True)
class Load:
    """Microbatches of K steps on the R ranks that have any, at most M each: float64 ``[K, R, M]``, 0 where is none.

    Attributes:
        tokens: Padding included.
        targets: Response tokens.
        attended: Pairs of tokens of which one sees the other.
        scored: Pairs of tokens whose scores are computed.
        real_tokens: Without padding.
    """

    tokens: FloatArray
    targets: FloatArray
    attended: FloatArray
    scored: FloatArray
    real_tokens: FloatArray

    @property
    def counts(self) -> FloatArray:
        """Microbatches of each rank, ``[K, R]``."""
        return (self.tokens > 0).sum(axis=2).astype(np.float64)

    def per_step(self, values: FloatArray) -> float:
        """The sum over ranks and microbatches, mean over steps."""
        return float(values.sum(axis=(1, 2)).mean())


@functools.lru_cache(maxsize=4096)
def cut_batches(lengths: Lengths, cut: Cut, steps: int = STEPS) -> list[Load]:
    """Cut steps of pairs into microbatches; the load of ``cut.side``, and behind it that of ``cut.other``."""
    draw = np.random.Generator(np.random.PCG64(_SEED))
    sides = [cut.side] if cut.other is None else [cut.side, cut.other]
    groups = []
    for _ in range(steps):
        rows = draw.integers(len(lengths.sides[cut.side].prompt), size=cut.pairs)
        groups.append(_groups_of_step(lengths, cut, sides, rows))
    return [_load(lengths, cut, side, groups) for side in sides]


def _sequences(lengths: Lengths, side: str, responses: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of every sequence of some pairs, ``[P, R]``."""
    found = lengths.sides[side]
    return np.stack([found.prompt[rows] + getattr(found, name)[rows] for name in responses], axis=1)


def _groups_of_step(
    lengths: Lengths, cut: Cut, sides: Sequence[str], rows: NDArray[np.int64]
) -> list[list[NDArray[np.int64]]]:
    """Rows of every microbatch of every rank that has any."""
    ranks = split_by_rank(*_costs(lengths, cut, rows), min(cut.ranks, cut.pairs))
    found = []
    for share in ranks:
        own = rows[share]
        tokens_SPR = np.stack([_sequences(lengths, side, cut.responses, own) for side in sides])
        tokens_SPR = -(-tokens_SPR // cut.sequence_multiple) * cut.sequence_multiple
        if cut.padding == "packed":
            tokens_P = tokens_SPR.sum(axis=2).max(axis=0)
            members = even_out(pack(tokens_P, cut.budget), *_costs(lengths, cut, own), tokens_P, cut.budget)
        else:
            longest = [round_up(int(length), cut.whole_multiple) for length in tokens_SPR.max(axis=(0, 2))]
            members = pack_padded(np.multiply(longest, len(cut.responses)), cut.budget)
        found.append([own[member] for member in members])
    return found


def _costs(lengths: Lengths, cut: Cut, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cost of each pair and of which the attention, as the loader counts them."""
    tokens_PR = _sequences(lengths, cut.side, cut.responses, rows)
    responses_PR = np.stack([getattr(lengths.sides[cut.side], name)[rows] for name in cut.responses], axis=1)
    return cut.cost.of(tokens_PR, responses_PR).sum(axis=1), cut.cost.query_key_pairs(tokens_PR).sum(axis=1)


def _load(lengths: Lengths, cut: Cut, side: str, groups: list[list[list[NDArray[np.int64]]]]) -> Load:
    most = max(len(rank) for step in groups for rank in step)
    size = (len(groups), max(len(step) for step in groups), most)
    load = Load(*(np.zeros(size) for _ in range(5)))
    for k, step in enumerate(groups):
        for r, rank in enumerate(step):
            for m, rows in enumerate(rank):
                sequences = _sequences(lengths, side, cut.responses, rows).ravel()
                load.real_tokens[k, r, m] = sequences.sum()
                sequences = -(-sequences // cut.sequence_multiple) * cut.sequence_multiple
                if cut.padding == "padded":
                    sequences = np.full_like(sequences, round_up(int(sequences.max()), cut.whole_multiple))
                targets = sum(int(getattr(lengths.sides[side], name)[rows].sum()) for name in cut.responses)
                shape = shape_of(
                    sequences.tolist(),
                    targets,
                    cut.attention,
                    cut.cost.window,
                    cut.whole_multiple,
                    cut.context,
                    cut.cost.full_share,
                )
                for name in ("tokens", "targets", "attended", "scored"):
                    getattr(load, name)[k, r, m] = getattr(shape, name)
    return load
