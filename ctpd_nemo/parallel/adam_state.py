"""The state of torch's AdamW in Megatron-Core's distributed checkpoints.

Megatron-Core 0.16.1 reads optimizer state into fused optimizers only: they have no count of steps a parameter. torch's
AdamW, which stands in without Transformer Engine and apex, makes its state in its first step, and counts in it.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that a checkpoint is read into, where there is none yet; nothing to do for fused optimizers."""
    adam = _only_part(optimizer).optimizer
    if not isinstance(adam, torch.optim.AdamW):
        return
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what ``sharded_state_dict`` of the "fully_reshardable" kind was filled with."""
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


def _only_part(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """A dense model has one optimizer for all its parameters; Megatron chains it all the same."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer
