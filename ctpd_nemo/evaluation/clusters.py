"""The standard error of a mean over pairs of which several ask the same thing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def standard_error(values: NDArray[np.float64], clusters: Sequence[Hashable] | None = None) -> float:
    """The error of the mean of ``values``, whose clusters are independent of each other, not what is in one.

    A model that knows a fact answers every question about it, so a second question is less than a second observation.
    With clusters g of G, deviations d from the mean and N values this is the cluster-robust error (Liang and Zeger
    1986),

        sqrt(G / (G - 1) * sum_g (sum_{i in g} d_i)^2) / N;

    where each value is a cluster of its own, the sample standard deviation over sqrt(N).

    Args:
        values: float64 ``[N]``.
        clusters: What each value belongs to; ``None``: each to itself.

    Returns:
        The error; 0 for a single cluster, whose error nobody knows.
    """
    labels = range(len(values)) if clusters is None else clusters
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(label, len(numbers)) for label in labels]
    n_clusters = len(numbers)
    if n_clusters < 2:
        return 0.0
    sums = np.bincount(index, weights=values - values.mean())
    return float(np.sqrt(n_clusters / (n_clusters - 1) * np.square(sums).sum()) / len(values))
