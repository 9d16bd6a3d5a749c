"""Optimizer state in Megatron-Core's distributed checkpoints, written and read right, and within a rank's share of it.

Data-parallel ranks share out the state of the distributed optimizer, and a share ends wherever it ends, within a
parameter too. On disk it is one tensor a parameter, Megatron-Core's kind "fully_reshardable": the only one that other
layouts can read. Three things go wrong in Megatron-Core, 0.16.1 to 0.19.2, for which this module is written:

- It gathers the state of all ranks on every rank to write it, and makes room for all of it to read it: 12 bytes a
  parameter in the memory of each process, several times over. Here one rank of a group has a parameter to write, the
  one that holds most of it, and a rank reads one parameter after the other.
- What it gathers is without the padding at the end of buckets, and it looks up parameters at their places with it: from
  the second bucket on, what it writes belongs to other elements.
- It reads optimizer state into fused optimizers only: they have no count of steps a parameter. torch's AdamW, which
  stands in without Transformer Engine and apex, makes its state in its first step, and counts in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_STATES = ("param", "exp_avg", "exp_avg_sq")

_Place: TypeAlias = ShardedTensor | ShardedTensorFactory


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of an optimizer, to be saved; every rank calls it together.

    Args:
        optimizer: Megatron's.
        model_state: The sharded state of the model that it updates.
    """
    part = _only_part(optimizer)
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(model_state, metadata=SHARDING)
    places = _places(model_state)
    own = _own_states(part)
    tensors = {}
    for index, shared in enumerate(_shared_parameters(part)):
        place = places[shared.parameter]
        # Another group of ranks writes what several of them have alike.
        if any(place.replica_id[:2]):
            continue
        states = {name: shared.gather(own.get(shared.parameter, {}).get(name), part) for name in _STATES}
        if shared.writer == part.data_parallel_group.rank():
            tensors[index] = {name: _sharded(place, name, state) for name, state in states.items() if state is not None}
    state = part.state_dict()
    return {**state, "param_state": tensors, "param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}


def expected_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """What is to be read before ``load_state``: all of it, but what ranks share out.

    Args:
        optimizer: Megatron's.
        model_state: The sharded state of the model that it updates.
    """
    _allocate_state(optimizer)
    part = _only_part(optimizer)
    if isinstance(part, DistributedOptimizer):
        part.load_state_dict(part.state_dict())
        return {}
    return part.sharded_state_dict(model_state, is_loading=True, metadata=SHARDING)


def load_state(
    optimizer: MegatronOptimizer,
    state: dict[str, Any],
    model_state: dict[str, Any],
    read: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Load what ``expected_state`` asked for, and this rank's share of the rest.

    Args:
        optimizer: Megatron's.
        state: What was read.
        model_state: The sharded state of the model that it updates.
        read: Fills a sharded state from the checkpoint; this rank calls it by itself.
    """
    part = _only_part(optimizer)
    if not isinstance(part, DistributedOptimizer):
        optimizer.load_state_dict(state)
        return
    part.load_state_dict({name: value for name, value in state.items() if not name.startswith("param_state")})
    # Megatron looks for every key of the state among the stored tensors, where steps are not, and gives all parameters
    # one and the same count, which each of them would then raise.
    adam = part.optimizer
    steps = {parameter: kept.pop("step").clone() for parameter, kept in adam.state.items() if "step" in kept}
    part.load_parameter_state_from_fully_reshardable(_Stored(part, model_state, read))
    for parameter, step in steps.items():
        adam.state[parameter]["step"] = step


class _Stored:
    """The stored states of parameters, each read when it is asked for."""

    def __init__(
        self,
        part: DistributedOptimizer,
        model_state: dict[str, Any],
        read: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        places = _places(model_state)
        self._places = [places[shared.parameter] for shared in _shared_parameters(part)]
        self._read = read

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self._places[index]
        shape = place.data.shape
        return self._read({name: _sharded(place, name, torch.empty(shape)) for name in _STATES})


@dataclass(frozen=True)
class _SharedParameter:
    """One parameter, and which of its elements, flattened, each rank of the data-parallel group updates."""

    parameter: Parameter
    shares: dict[int, slice]

    @property
    def writer(self) -> int:
        """The rank that writes it: it has the most of it."""
        return max(self.shares, key=lambda rank: (self.shares[rank].stop - self.shares[rank].start, -rank))

    def gather(self, own: Tensor | None, part: DistributedOptimizer) -> Tensor | None:
        """One state of all elements, fp32 ``[elements]``, on the rank that writes it, of what each rank has of it.

        Where one rank has it all, nothing is copied.
        """
        group = part.data_parallel_group
        rank, writer = group.rank(), self.writer
        if own is None:
            return None
        own = own.detach().float()
        if len(self.shares) == 1:
            return own
        if rank != writer:
            _exchange([dist.P2POp(dist.isend, own.contiguous(), dist.get_global_rank(group, writer), group)])
            return None
        whole = own.new_empty(self.parameter.numel())
        whole[self.shares[rank]] = own
        others = (other for other in self.shares if other != rank)
        _exchange(
            [
                dist.P2POp(dist.irecv, whole[self.shares[other]], dist.get_global_rank(group, other), group)
                for other in others
            ]
        )
        # It is only to be written.
        return whole.cpu()


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _shared_parameters(part: DistributedOptimizer) -> Iterator[_SharedParameter]:
    """The parameters of an optimizer in the order in which Megatron numbers them."""
    ranks = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            length = bucket.grad_data.numel() // ranks
            first, last = start - bucket.offset, end - bucket.offset
            shares = {
                rank: slice(max(first, rank * length) - first, min(last, (rank + 1) * length) - first)
                for rank in range(first // length, (last - 1) // length + 1)
            }
            yield _SharedParameter(parameter, shares)


def _own_states(part: DistributedOptimizer) -> dict[Parameter, dict[str, Tensor]]:
    """What this rank has of each parameter that it has anything of; nothing is copied."""
    states = part.get_parameter_state_dp_reshardable()
    own: dict[Parameter, dict[str, Tensor]] = {}
    for number, of_buffer in enumerate(part.gbuf_ranges):
        for dtype, of_buckets in of_buffer.items():
            for of_bucket, kept in zip(of_buckets, states[number][dtype], strict=True):
                own |= dict(zip(of_bucket["param_map"], kept, strict=True))
    return own


def _places(model_state: dict[str, Any]) -> dict[Tensor, _Place]:
    """Where each parameter belongs in the whole model."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {place.data: place for place in nested_values(sharded)}


def _sharded(place: _Place, name: str, state: Tensor) -> _Place:
    """A state of a parameter, at the place of the parameter in the whole model."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{place.key}",
        "data": state.reshape(place.data.shape),
        # One rank of the group has it.
        "replica_id": (*place.replica_id[:2], 0),
    }
    if isinstance(place, ShardedTensor):
        changes["dtype"] = state.dtype
    return replace(place, **changes)


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that a checkpoint is read into, where there is none yet; nothing to do for fused optimizers."""
    adam = _only_part(optimizer).optimizer
    if not isinstance(adam, torch.optim.AdamW):
        return
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether data-parallel ranks share its state out."""
    return isinstance(_only_part(optimizer), DistributedOptimizer)


def _only_part(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """A dense model has one optimizer for all its parameters; Megatron chains it all the same."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer
