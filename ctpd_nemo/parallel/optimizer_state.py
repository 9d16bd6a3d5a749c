"""Optimizer state in Megatron-Core's distributed checkpoints, written and read right.

Two things go wrong in Megatron-Core, 0.16.1 to 0.19.2, for which this module is written:

- It reads optimizer state into fused optimizers only: they have no count of steps a parameter. torch's AdamW, which
  stands in without Transformer Engine and apex, makes its state in its first step, and counts in it.
- The "fully_reshardable" kind gathers each buffer without the padding at the end of its buckets, and then looks up
  parameters at their places with it: from the second bucket on, what is written belongs to other elements.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# The optimizer state as one tensor a parameter: the only kind that other layouts can read.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """``sharded_state_dict`` of the "fully_reshardable" kind, to be saved or to be loaded into."""
    if is_loading:
        _allocate_state(optimizer)
    with _places_without_padding(_only_part(optimizer)):
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=SHARDING)


@contextlib.contextmanager
def _places_without_padding(part: MegatronOptimizer) -> Iterator[None]:
    """Give buffers the places that their parameters have where buckets follow each other without padding."""
    buffers = part.buffers if isinstance(part, DistributedOptimizer) else []
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        dropped, before = [], 0
        for bucket in buffer.buckets:
            dropped.append(bucket.offset - before)
            before += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - dropped[bucket], end - dropped[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that a checkpoint is read into, where there is none yet; nothing to do for fused optimizers."""
    adam = _only_part(optimizer).optimizer
    if not isinstance(adam, torch.optim.AdamW):
        return
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what ``sharded_state`` was filled with."""
    part = _only_part(optimizer)
    if not (isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)):
        optimizer.load_state_dict(state)
        return
    tensors = state.pop("param_state")
    part.load_state_dict(state)
    # Megatron looks for every key of the state among the stored tensors, where steps are not, and gives all parameters
    # one and the same count, which each of them would then raise.
    steps = {parameter: kept.pop("step").clone() for parameter, kept in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether data-parallel ranks share its state out."""
    return isinstance(_only_part(optimizer), DistributedOptimizer)


def _only_part(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """A dense model has one optimizer for all its parameters; Megatron chains it all the same."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer
