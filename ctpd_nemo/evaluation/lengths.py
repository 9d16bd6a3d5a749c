"""How long generations are, whether they end, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ctpd_nemo.evaluation.clusters import standard_error
from ctpd_nemo.evaluation.model import Generation

_PERCENTILES = (5, 25, 75, 95)
_GRAM = 4


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of ``n`` generations, in tokens of the model, the end of turn left out.

    Attributes:
        n: Generations.
        mean: Mean length.
        mean_standard_error: See :func:`ctpd_nemo.evaluation.clusters.standard_error`.
        median: Middle length.
        percentiles: Length at the 5th, 25th, 75th and 95th percent, linear between neighbours.
        ended: Share that ended by itself, before the longest length that was allowed.
        repeated_4grams: Share of the 4-grams of tokens that stood earlier in the same generation, over all 4-grams
            of all generations; 0 where there are none.
    """

    n: int
    mean: float
    mean_standard_error: float
    median: float
    percentiles: dict[str, float]
    ended: float
    repeated_4grams: float


def length_statistics(generations: Sequence[Generation], clusters: Sequence[Hashable] | None = None) -> Lengths:
    """The statistics of at least one generation.

    Args:
        generations: In the order of what they answer.
        clusters: What each answers; ``None`` where all answer something else.
    """
    lengths = np.array([len(generation.token_ids) for generation in generations], dtype=np.float64)
    total = repeated = 0
    for generation in generations:
        ids = generation.token_ids
        grams = [tuple(ids[at : at + _GRAM]) for at in range(len(ids) - _GRAM + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return Lengths(
        n=len(lengths),
        mean=float(lengths.mean()),
        mean_standard_error=standard_error(lengths, clusters),
        median=float(np.median(lengths)),
        percentiles={str(percent): float(np.percentile(lengths, percent)) for percent in _PERCENTILES},
        ended=float(np.mean([generation.ended for generation in generations])),
        repeated_4grams=repeated / total if total else 0.0,
    )
