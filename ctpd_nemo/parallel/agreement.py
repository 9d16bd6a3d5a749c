"""What one rank knows and all must act on."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ctpd_nemo.parallel.layout import local_device


def any_rank(value: bool, groups: Iterable[Any] = (None,)) -> bool:
    """Whether ``value`` is true on any rank; every rank calls it together.

    Args:
        value: Of this rank.
        groups: Process groups, one after the other; ``None`` is the default one.
    """
    flag = torch.tensor([int(value)], dtype=torch.int32, device=local_device())
    for group in groups:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def any_rank_of_replica(value: bool) -> bool:
    """Whether ``value`` is true on any rank of this data-parallel replica; all of it call it together."""
    return any_rank(value, (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()))


def first_reason(reason: str | None) -> str | None:
    """The first rank's reason that there is, on every rank; ``None`` where no rank has any."""
    if not any_rank(reason is not None):
        return None
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(told for told in reasons if told is not None)
