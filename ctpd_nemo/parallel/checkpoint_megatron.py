"""Megatron-Core's ``dist_checkpointing.load`` on an open checkpoint.

Its own (0.16.1 to 0.19.2, for which this module is written) opens the files of a checkpoint in several places, and
loads what is pickled there by plain ``pickle`` or with ``weights_only=False``: the index and ``common.pt`` on every
call, objects in torch's planner. Here are the same steps with the parts of it that know how state is cut up, but for
all reading, which is ``CheckpointReader``'s. Nothing of Megatron-Core and torch that is called here opens a file.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.agreement import any_rank
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader, reading
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors


def load(sharded: dict[str, Any], checkpoint: CheckpointReader) -> dict[str, Any]:
    """Megatron-Core's sharded state, filled from a checkpoint, with the common state beside it; all ranks call it.

    Raises:
        InputError: The checkpoint lacks something, or has it in another form; on every rank, where any meets it.
    """
    force_all_tensors_to_non_fp8(sharded)
    sharded, local, factories = load_preprocess(sharded)
    state = checkpoint.common()
    merge(state, local)
    sharded, _ = extract_sharded_base(sharded)
    validate_sharding_integrity(determine_global_metadata(sharded)[1])
    # Of what data-parallel replicas ask for alike, each reads a share and gives it to the others.
    shares = FullyParallelLoadStrategyWrapper(
        _Reading(checkpoint), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    merge(state, shares.load(sharded, checkpoint.folder))
    return apply_factory_merges(state, factories)


def read(sharded: dict[str, Any], checkpoint: CheckpointReader) -> dict[str, Any]:
    """A sharded state of tensors, filled from a checkpoint by this rank alone, in the memory of what it asks for.

    Raises:
        InputError: The checkpoint lacks one, or has it in another form.
    """
    sharded, _, factories = load_preprocess(sharded)
    tensors = CheckpointTensors(checkpoint)
    dict_list_map_inplace(functools.partial(_part, tensors), sharded)
    return apply_factory_merges(sharded, factories)


def _part(tensors: CheckpointTensors, place: ShardedTensor) -> Tensor:
    """One shard of a tensor, on the CPU; rows of a vocabulary's padding that are not there are zeros."""
    sizes = (*(1,) * place.prepend_axis_num, *place.local_shape)
    expected = None if place.allow_shape_mismatch else place.global_shape
    return tensors.region(place.key, place.global_offset, sizes, expected).reshape(place.local_shape)


@contextlib.contextmanager
def raising_together(checkpoint: CheckpointReader) -> Iterator[None]:
    """Raise what any rank meets in reading on all of them; the others would wait for it in what they do next.

    Raises:
        InputError: The checkpoint lacks something, or has it in another form.
    """
    error = None
    try:
        with reading(checkpoint.folder):
            yield
    except InputError as found:
        error = found
    if any_rank(error is not None):
        met: list[InputError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(met, error)
        raise error or next(first for first in met if first is not None)


class _Reading:
    """The load strategy: ``TorchDistLoadShardedStrategy.load`` of Megatron-Core, reading from an open checkpoint."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self._checkpoint = checkpoint

    def load(self, sharded: dict[str, Any], folder: Path, async_strategy: str | None = None) -> dict[str, Any]:
        """Fill a part of the state; the wrapper asks for objects and for tensors, one after the other."""
        with raising_together(self._checkpoint):
            return self._fill(sharded)

    def _fill(self, sharded: dict[str, Any]) -> dict[str, Any]:
        tensors = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor)]
        flat, paths, renamed = _replace_state_dict_keys_with_sharded_keys(sharded)
        state = mcore_to_pyt_state_dict(flat, is_loading=True)
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[item for item in tensors if not item.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={item.key: item for item in tensors if item.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        # The steps of ``torch.distributed.checkpoint.load`` in one process.
        planner.set_up_planner(state, self._checkpoint.metadata, is_coordinator=True)
        (plan,) = planner.create_global_plan([planner.create_local_plan()])
        self._read(planner.finish_plan(plan), planner)
        unwrapped = {key: _unwrap_pyt_sharded_tensor(value) for key, value in planner.state_dict.items()}
        filled = _replace_sharded_keys_with_state_dict_keys(unwrapped, paths, renamed)
        _restore_dict_types(filled, sharded)
        return filled

    def _read(self, plan: LoadPlan, planner: MCoreLoadPlanner) -> None:
        """``FileSystemReader.read_data`` of torch."""
        pieces: dict[Any, list[Any]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # A planner would load bytes, whatever these name; what they hold has been read.
                key = item.dest_index.fqn
                if not isinstance(planner.state_dict[key], io.BytesIO):
                    raise ValueError(f"{key} is no tensor")
                planner.state_dict[key] = self._checkpoint.object(item.storage_index.fqn)
            else:
                pieces.setdefault(item.storage_index, []).append(item)
        for index, stored in self._checkpoint.tensors(pieces):
            for item in pieces[index]:
                region = zip(item.storage_offsets, item.lengths, strict=True)
                source = stored[tuple(slice(start, start + length) for start, length in region)]
                target = planner.resolve_tensor(item).detach()
                if target.size() != source.size():
                    raise ValueError(f"{index.fqn} of shape {tuple(source.size())} for {tuple(target.size())}")
                target.copy_(source)
                planner.commit_tensor(item, target)
