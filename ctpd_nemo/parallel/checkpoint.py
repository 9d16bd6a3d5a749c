"""Distributed checkpoints: Megatron-Core's ``torch_dist`` format, written by any layout and read by any other.

A checkpoint is a folder. It is written under a temporary name and renamed when every rank is done, so a folder with
the final name is whole.
"""

import contextlib
import json
import os
import queue
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_pickles import check_pickles
from ctpd_nemo.parallel.optimizer import LightningOptimizer
from ctpd_nemo.parallel.optimizer_state import SHARDING, load_state, sharded_state

_WRITING = ".writing"
_REPLACED = ".replaced"

# Megatron-Core's writer (0.16.1) hands results over through a queue in a process of its own, which it spawns and which
# imports everything again. A synchronous save needs no more than a queue in this process.
filesystem_async._results_queue = queue.Queue()


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
    folder: str | Path, chunks: Sequence[MegatronModule], optimizer: LightningOptimizer | None, state: TrainState
) -> None:
    """Write a checkpoint; every rank of the job calls this together.

    Args:
        folder: The final name; an existing folder of that name is replaced once the new one is whole.
        chunks: Model chunks of this rank.
        optimizer: ``None`` writes weights only.
        state: The rest, equal on every rank.
    """
    final = Path(folder)
    writing = final.with_name(final.name + _WRITING)
    if dist.get_rank() == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    dist.barrier()
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
    dist_checkpointing.save(sharded, str(writing), content_metadata=SHARDING)
    dist.barrier()
    if dist.get_rank() == 0:
        _replace(final, writing)
    dist.barrier()


def _replace(final: Path, writing: Path) -> None:
    """Give a new checkpoint its name; an old one of that name goes after the new one has it, not before."""
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.replace(final, replaced)
    os.replace(writing, final)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folder: str | Path) -> None:
    """Delete a checkpoint; rank 0 does it."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


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


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Whole checkpoints in a folder of checkpoints named by step, oldest first."""
    found = (path for path in Path(folder).glob("step-*") if path.suffix not in (_WRITING, _REPLACED))
    return sorted(path for path in found if _is_checkpoint(path))


def check_is_checkpoint(folder: str | Path) -> None:
    """Stop with an ``InputError`` where ``folder`` is not a whole checkpoint."""
    if not _is_checkpoint(folder):
        found = "a folder without metadata.json" if Path(folder).is_dir() else "nothing"
        raise InputError(str(folder), found, "a checkpoint folder written by training")
    with reading(folder):
        check_pickles(folder)


def _is_checkpoint(folder: str | Path) -> bool:
    with reading(folder):
        return bool(dist_checkpointing.check_is_distributed_checkpoint(str(folder)))


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
        saved = read_state(folder)
        if saved.fingerprints.get("layout") == layout_name():
            sharded["rng"] = _rng_object()
    with reading(folder):
        loaded = dist_checkpointing.load(sharded, str(folder))
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


def layout_name() -> str:
    """The model-parallel sizes of this job in one word; checkpoints of equal names hold equal random states."""
    return (
        f"tp{parallel_state.get_tensor_model_parallel_world_size()}"
        f"-pp{parallel_state.get_pipeline_model_parallel_world_size()}"
    )
