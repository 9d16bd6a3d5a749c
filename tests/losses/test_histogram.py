"""Counts of span weights against NumPy's."""

import numpy as np
import torch

from ctpd_nemo.losses.histogram import EDGES, named_counts, weight_counts


def test_counts_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    # Pairs (0, 3) and (2, 1); edges themselves among the weights.
    weights = np.concatenate([rng.normal(1, 2, 500), EDGES, [1e9, -1e9]]).astype(np.float32)
    response = rng.integers(0, 4, len(weights))
    counts = weight_counts(
        torch.from_numpy(weights), torch.from_numpy(response), torch.tensor([3, 1], dtype=torch.int32)
    )
    edges = np.array([-np.inf, *np.array(EDGES, dtype=np.float32), np.inf])
    for row, responses in zip(counts, ([0, 2], [1, 3]), strict=True):
        expected, _ = np.histogram(weights[np.isin(response, responses)], edges)
        assert row.tolist() == expected.tolist()


def test_names_are_lower_edges() -> None:
    weights, response = torch.tensor([1.0, 1.2, 0.99, -3.0]), torch.tensor([0, 0, 1, 1])
    counts = weight_counts(weights, response, torch.tensor([1]))
    assert named_counts(counts) == {"chosen": {"1": 2}, "rejected": {"-inf": 1, "0.707": 1}}


def test_a_microbatch_without_pairs_counts_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert not weight_counts(torch.zeros(0), none, none).any()
