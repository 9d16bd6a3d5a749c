"""Distributed checkpoints: Megatron-Core's ``torch_dist`` format, written by any layout and read by any other.

What is in them and how it is read; ``checkpoint_writer`` writes them, ``checkpoint_files`` knows which are whole.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_files import check_is_checkpoint as check_files
from ctpd_nemo.parallel.checkpoint_pickles import check_pickles
from ctpd_nemo.parallel.checkpoint_writer import CheckpointWriter
from ctpd_nemo.parallel.optimizer import LightningOptimizer
from ctpd_nemo.parallel.optimizer_state import is_distributed, load_state, sharded_state


@dataclass
class TrainState:
    """What a checkpoint holds beside tensors.

    Attributes:
        trainer: JSON-like state of the training loop: counters, callbacks, the position in the data.
        fingerprints: What the run was trained on; compared on resume.
    """

    trainer: dict[str, Any]
    fingerprints: dict[str, str]


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
            sharded["optimizer"] = sharded_state(optimizer.megatron, sharded, is_loading=False)
            sharded["scheduler"] = optimizer.scheduler.state_dict()
            sharded["rng"] = _rng_object()
        # JSON, so that reading it back needs no pickle.
        sharded["state"] = json.dumps({"trainer": state.trainer, "fingerprints": state.fingerprints})
        return sharded

    (writer or CheckpointWriter()).save(folder, make_state)


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turn whatever reading a damaged checkpoint raises into an ``InputError``."""
    try:
        yield
    except InputError:
        raise
    # Several libraries with errors of their own; that of torch's checkpoints is no ``Exception``.
    except (Exception, CheckpointException) as error:
        reason = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
        found = f"a checkpoint that cannot be read ({reason})"
        raise InputError(str(folder), found, "a whole one; remove it to go on from the one before") from error


def check_is_checkpoint(folder: str | Path) -> None:
    """Stop with an ``InputError`` where ``folder`` is no whole checkpoint, or holds pickles that are not to be read."""
    check_files(folder)
    with reading(folder):
        check_pickles(folder)


def read_state(folder: str | Path) -> TrainState:
    """The part of a checkpoint that is no tensor."""
    check_is_checkpoint(folder)
    with reading(folder):
        return TrainState(**json.loads(dist_checkpointing.load_common_state_dict(Path(folder))["state"]))


def load(folder: str | Path, chunks: Sequence[MegatronModule], optimizer: LightningOptimizer | None) -> TrainState:
    """Fill model, optimizer, schedule and random states of this rank from a checkpoint of any layout.

    Random states are those of the same rank where the layout is the same; another layout keeps its own.

    Raises:
        InputError: The folder is no whole checkpoint.
    """
    check_is_checkpoint(folder)
    sharded = _model_state(chunks)
    if optimizer is not None:
        sharded["optimizer"] = sharded_state(optimizer.megatron, sharded, is_loading=True)
        _check_optimizer(folder, optimizer)
        saved = read_state(folder)
        if saved.fingerprints.get("layout") == layout_name():
            sharded["rng"] = _rng_object()
    with reading(folder):
        # Of what data-parallel replicas ask for alike, each reads a share and gives it to the others.
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        loaded = dist_checkpointing.load(sharded, str(folder), strategy)
    for name, model in _models(chunks).items():
        model.load_state_dict(loaded[name])
    if optimizer is not None:
        load_state(optimizer.megatron, loaded["optimizer"])
        optimizer.scheduler.load_state_dict(loaded["scheduler"])
        if "rng" in sharded:
            torch.set_rng_state(loaded["rng"]["torch"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(loaded["rng"]["device"])
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
    return TrainState(**json.loads(loaded["state"]))


def _check_optimizer(folder: str | Path, optimizer: LightningOptimizer) -> None:
    """Stop where the state is that of the other kind of optimizer; only the distributed one says how it is cut up."""
    with reading(folder):
        saved = "param_state_sharding_type" in dist_checkpointing.load_common_state_dict(Path(folder))["optimizer"]
    if saved != is_distributed(optimizer.megatron):
        found, expected = (str(kind).lower() for kind in (not saved, saved))
        raise InputError("parallel.distributed_optimizer", found, f"{expected}, as {folder} was written")


def layout_name() -> str:
    """The model-parallel sizes of this job in one word; checkpoints of equal names hold equal random states."""
    return (
        f"tp{parallel_state.get_tensor_model_parallel_world_size()}"
        f"-pp{parallel_state.get_pipeline_model_parallel_world_size()}"
    )
