"""How span weights are spread, in a few counts that fit into a log."""

import math

import torch
from torch import Tensor

# Half octaves around 1, where the weights of a contrastive pair lie; below them what other weightings can give.
EDGES = (-1.0, -0.5, 0.0, *(2.0 ** (half / 2 - 3) for half in range(13)))
N_BINS = len(EDGES) + 1


def weight_counts(weights_S: Tensor, response_S: Tensor, rejected_P: Tensor) -> Tensor:
    """Count the weights of a microbatch.

    Args:
        weights_S: Weight of each span, ``[S]``.
        response_S: The response of each span, integer ``[S]``.
        rejected_P: The rejected response of each of the ``P`` pairs; there are ``2 P`` responses.

    Returns:
        int64 ``[2, N_BINS]``, of chosen and of rejected responses; bin b holds ``EDGES[b - 1] <= w < EDGES[b]``.
    """
    is_rejected_R = torch.zeros(2 * len(rejected_P), dtype=torch.long, device=weights_S.device)
    is_rejected_R[rejected_P.long()] = 1
    edges = torch.tensor(EDGES, dtype=weights_S.dtype, device=weights_S.device)
    bin_S = torch.bucketize(weights_S, edges, right=True)
    place_S = is_rejected_R[response_S.long()] * N_BINS + bin_S
    return torch.bincount(place_S, minlength=2 * N_BINS).view(2, N_BINS)


def named_counts(counts: Tensor) -> dict[str, dict[str, int]]:
    """``chosen`` and ``rejected``: counts by the lower edge of their bin, those of empty bins left out."""
    names = [f"{edge:.3g}" for edge in (-math.inf, *EDGES)]
    return {
        side: {name: count for name, count in zip(names, row, strict=True) if count}
        for side, row in zip(("chosen", "rejected"), counts.tolist(), strict=True)
    }
