"""Whether a model that is sure of its preferences is right to be."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.evaluation.clusters import standard_error


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like confidence.

    Attributes:
        lower: Least confidence of the bin.
        upper: Its end; it belongs to the next bin, but for the last.
        n: Pairs in it.
        confidence: Their mean confidence; ``None`` where there are none.
        accuracy: Share of them whose preference is right, a tie counting half; ``None`` where there are none.
    """

    lower: float
    upper: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of p = sigma(beta * margin), the probability that the chosen response is the better one.

    Which response stands first is a convention, so a pair is read as a decision for the likelier response with
    confidence max(p, 1 - p), which is right where p > 1/2.

    Attributes:
        beta: Of the implicit reward.
        expected_calibration_error: Sum over bins of n / N * |accuracy - confidence| (Guo et al. 2017, equation 3).
        brier_score: Mean of (1 - p)^2; 0.25 for a model without preferences.
        brier_score_standard_error: See :func:`ctpd_nemo.evaluation.clusters.standard_error`.
        bins: Of equal width, over confidences from 1/2 to 1.
    """

    beta: float
    expected_calibration_error: float
    brier_score: float
    brier_score_standard_error: float
    bins: list[Bin]


def calibration(
    margins: NDArray[np.float64], beta: float, n_bins: int = 10, clusters: Sequence[Hashable] | None = None
) -> Calibration:
    """Calibration of reward margins.

    Args:
        margins: In nats and without beta, float64 ``[n_pairs]``; at least one pair.
        beta: Of the implicit reward.
        n_bins: Of equal width.
        clusters: What each pair asks; ``None`` where all ask something else.
    """
    # exp(-log(1 + exp(-x))): no overflow at either end.
    probability = np.exp(-np.logaddexp(0.0, -beta * margins))
    confidence = np.maximum(probability, 1 - probability)
    right = (np.sign(margins) + 1) / 2
    place = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    bins, error = [], 0.0
    for index in range(n_bins):
        inside = place == index
        n = int(inside.sum())
        lower, upper = 0.5 + index / (2 * n_bins), 0.5 + (index + 1) / (2 * n_bins)
        if not n:
            bins.append(Bin(lower, upper, 0, None, None))
            continue
        found = Bin(lower, upper, n, float(confidence[inside].mean()), float(right[inside].mean()))
        bins.append(found)
        error += n / len(margins) * abs(float(right[inside].mean()) - float(confidence[inside].mean()))
    squares = (1 - probability) ** 2
    return Calibration(beta, error, float(squares.mean()), standard_error(squares, clusters), bins)
