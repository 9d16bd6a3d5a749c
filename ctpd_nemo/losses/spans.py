"""From tokens to spans to responses.

Tokens of a span need not lie on one rank: under context parallelism every rank holds a part of each sequence, and the
sums of spans are brought together here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverGroup(torch.autograd.Function):
    """Sum over a group whose ranks then all compute the same loss: the gradient of each part is the gradient itself."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_by(values_N: Tensor, index_N: Tensor, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum values that share an index.

    Args:
        values_N: Float ``[N]``.
        index_N: Integer ``[N]`` in ``[0, size)``.
        size: Number of sums.
        group: Context-parallel group over which the values of one index are spread, ``None`` for one process.

    Returns:
        ``[size]``, zero where no value has the index.
    """
    sums = values_N.new_zeros(size).index_add(0, index_N, values_N)
    if group is not None and group.size() > 1:
        sums = _SumOverGroup.apply(sums, group)
    return sums
