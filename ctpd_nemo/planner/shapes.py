"""The sizes of a microbatch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a microbatch that memory and work depend on.

    Attributes:
        tokens: Padding included.
        targets: Response tokens, at whose positions log-probs are computed.
        sequences: Packed end to end.
        longest: Tokens of the longest of them.
        attended: Pairs of tokens of which one sees the other.
        scored: Pairs of tokens whose scores are computed: the same, or more of them.
    """

    tokens: int
    targets: int
    sequences: int
    longest: int
    attended: int
    scored: int


def shape_of(
    lengths: Sequence[int],
    targets: int,
    attention: str = "fused",
    window: int | None = None,
    multiple: int = 1,
    context: int = 1,
    full_share: float = 0.0,
) -> Shape:
    """The shape of a microbatch of sequences of some lengths.

    Args:
        lengths: Tokens of each.
        targets: Response tokens of all.
        attention: "fused" computes the scores that count; "local" pads all sequences to the longest and computes all.
        window: Tokens that each token sees at most, itself included.
        multiple: The last sequence is padded until the tokens of all are a multiple of this.
        context: Context-parallel size: "local" attention computes all scores on each of so many ranks.
        full_share: Share of the layers without the window; pairs are the mean over all layers.
    """
    missing = -sum(lengths) % multiple
    lengths = [*lengths[:-1], lengths[-1] + missing]
    attended = attended_pairs(lengths, window)
    if full_share:
        attended += round(full_share * (attended_pairs(lengths) - attended))
    scored = attended if attention == "fused" else context * len(lengths) * max(lengths) ** 2
    return Shape(sum(lengths), targets, len(lengths), max(lengths), attended, scored)


def fullest_shape(tokens: int, longest: int) -> Shape:
    """What asks for the most of so many tokens: sequences of full length, all of it response."""
    whole, rest = divmod(tokens, longest)
    return shape_of([longest] * whole + [rest] * (rest > 0), targets=tokens)


def attended_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs of tokens of which one sees the other, over causal sequences, each token with itself included."""
    total = 0
    for length in lengths:
        seen = length if window is None else min(window, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total
