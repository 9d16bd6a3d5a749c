"""Distributed checkpoints: Megatron-Core's ``torch_dist`` format, written by any layout and read by any other.

What is in them, and where it goes. ``checkpoint_writer`` writes them, ``checkpoint_files`` knows which are whole,
``checkpoint_reader`` reads them.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel import checkpoint_megatron
from ctpd_nemo.parallel.checkpoint_pickles import refusal
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader, TrainState, reading
from ctpd_nemo.parallel.checkpoint_writer import CheckpointWriter
from ctpd_nemo.parallel.optimizer import LightningOptimizer
from ctpd_nemo.parallel.optimizer_state import expected_state, is_distributed, load_state, sharded_state

# What is in no shard; the last is Megatron-Core's own, over what it was told of the optimizer's.
_COMMON = {"state", "optimizer", "scheduler", "content_metadata"}


def _models(chunks: Sequence[MegatronModule]) -> dict[str, MegatronModule]:
    """The models inside the data-parallel wrappers, by their place in a checkpoint's state."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: unwrap_model(chunk) for name, chunk in zip(names, chunks, strict=True)}


def _model_state(chunks: Sequence[MegatronModule]) -> dict[str, Any]:
    return {name: model.sharded_state_dict() for name, model in _models(chunks).items()}


def _rng_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _rng_object() -> ShardedObject:
    """The random states of this rank; ranks of one data-parallel group hold the same."""
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return ShardedObject(
        "rng_state",
        _rng_state(),
        (pipeline.size(), tensor.size()),
        (pipeline.rank(), tensor.rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def save(
    folder: str | Path,
    chunks: Sequence[MegatronModule],
    optimizer: LightningOptimizer | None,
    state: TrainState,
    writer: CheckpointWriter | None = None,
) -> None:
    """Write a checkpoint; every rank of the job calls this together.

    Args:
        folder: The final name; an existing folder of that name is replaced once the new one is whole.
        chunks: Model chunks of this rank.
        optimizer: ``None`` writes weights only.
        state: The rest, equal on every rank.
        writer: Writes it; by default one that is done when this returns.

    Raises:
        SaveFailed: It could not be written, on whichever rank.
    """

    def make_state() -> dict[str, Any]:
        for chunk in chunks:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                # What the last step updated is gathered by the next forward pass; there may be none.
                chunk.start_param_sync(force_sync=True)
        sharded = _model_state(chunks)
        if optimizer is not None:
            sharded["optimizer"] = sharded_state(optimizer.megatron, sharded)
            sharded["scheduler"] = optimizer.scheduler.state_dict()
            sharded["rng"] = _rng_object()
        # JSON, so that reading it back needs no pickle.
        sharded["state"] = json.dumps({"trainer": state.trainer, "fingerprints": state.fingerprints})
        return sharded

    (writer or CheckpointWriter()).save(folder, make_state)


def read_state(checkpoint: str | Path | CheckpointReader) -> TrainState:
    """The part of a checkpoint that is this project's own, and no tensor.

    Raises:
        InputError: It is no whole checkpoint.
    """
    return CheckpointReader.of(checkpoint).train_state()


def load(
    checkpoint: str | Path | CheckpointReader, chunks: Sequence[MegatronModule], optimizer: LightningOptimizer | None
) -> TrainState:
    """Fill model, optimizer, schedule and random states of this rank from a checkpoint of any layout.

    Random states are those of the same rank where the layout is the same; another layout keeps its own.

    Raises:
        InputError: It is no whole checkpoint, or one of another model.
    """
    checkpoint = CheckpointReader.of(checkpoint)
    state, common = checkpoint.train_state(), checkpoint.common()
    # What is asked for in shards is filled from shards alone: what Transformer Engine loads by itself is among it.
    if unknown := common.keys() - _COMMON:
        raise refusal(str(checkpoint.folder), f"a common state with {', '.join(sorted(map(repr, unknown)))}")
    sharded = _model_state(chunks)
    if optimizer is not None:
        sharded["optimizer"] = expected_state(optimizer.megatron, sharded)
        _check_optimizer(checkpoint, common, optimizer)
        if state.fingerprints.get("layout") == layout_name():
            sharded["rng"] = _rng_object()
    with reading(checkpoint.folder):
        loaded = checkpoint_megatron.load(sharded, checkpoint)
        for name, model in _models(chunks).items():
            model.load_state_dict(loaded[name])
        if optimizer is not None:
            with checkpoint_megatron.raising_together(checkpoint):
                read = functools.partial(checkpoint_megatron.read, checkpoint=checkpoint)
                load_state(optimizer.megatron, loaded["optimizer"], _model_state(chunks), read)
            optimizer.scheduler.load_state_dict(loaded["scheduler"])
            if "rng" in sharded:
                torch.set_rng_state(loaded["rng"]["torch"])
                if torch.cuda.is_available():
                    torch.cuda.set_rng_state(loaded["rng"]["device"])
                tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
    return state


def _check_optimizer(checkpoint: CheckpointReader, common: dict[str, Any], optimizer: LightningOptimizer) -> None:
    """Stop where the state is that of the other kind of optimizer; only the distributed one says how it is cut up."""
    with reading(checkpoint.folder):
        saved = "param_state_sharding_type" in common["optimizer"]
    if saved != is_distributed(optimizer.megatron):
        found, expected = (str(kind).lower() for kind in (not saved, saved))
        expected = f"{expected}, as {checkpoint.folder} was written"
        raise InputError("parallel.distributed_optimizer", found, expected)


def layout_name() -> str:
    """The model-parallel sizes of this job in one word; checkpoints of equal names hold equal random states."""
    return (
        f"tp{parallel_state.get_tensor_model_parallel_world_size()}"
        f"-pp{parallel_state.get_pipeline_model_parallel_world_size()}"
    )
