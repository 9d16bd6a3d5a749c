"""Parallel sizes, and the process groups that they stand for."""

import datetime
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.cpu import enable_cpu_execution
from ctpd_nemo.parallel.hang import GRACE_MINUTES
from ctpd_nemo.parallel.launcher import end_with_launcher
from ctpd_nemo.parallel.ranks import check_device, name_rank, read_ranks, world_size
from ctpd_nemo.parallel.standstill import record_collectives

# A year: NCCL counts milliseconds.
_LONGEST_MINUTES = 60 * 24 * 365


@dataclass
class ParallelConfig:
    """How one job is cut over its processes. The data-parallel size is what is left of the world size.

    Attributes:
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        virtual_pipeline: Model chunks a pipeline stage holds (interleaved schedule); ``None`` for one.
        context: Context-parallel size: ranks over which every sequence is cut.
        context_communication: How those ranks exchange keys and values: "p2p" (a ring) or "a2a" (heads for tokens).
        sequence: Sequence parallelism within the tensor-parallel group.
        distributed_optimizer: Shard optimizer state over the data-parallel group.
        recompute: Activations to recompute in the backward pass: "none", "selective" (core attention) or "full".
        overlap_grad_reduce: Reduce gradients while the backward pass goes on.
        overlap_param_gather: Gather parameters while the forward pass goes on; needs the distributed optimizer.
        overlap_tensor: Exchange activations of tensor parallelism while the products around go on; needs sequence
            parallelism and Transformer Engine. Every microbatch is filled up to the token budget.
        timeout_minutes: How long ranks wait for one that does not come; then the job ends, and names it (``hang``).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    context_communication: str = "p2p"
    sequence: bool = False
    distributed_optimizer: bool = True
    recompute: str = "none"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_tensor: bool = False
    timeout_minutes: float = 30.0

    def check(self, world_size: int) -> None:
        """Stop with an ``InputError`` where these sizes cannot make a layout of ``world_size`` processes."""
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"parallel.{name}", str(getattr(self, name)), "1 or more")
        if not 0 < self.timeout_minutes <= _LONGEST_MINUTES:
            expected = f"a positive number of minutes, {_LONGEST_MINUTES} at most"
            raise InputError("parallel.timeout_minutes", str(self.timeout_minutes), expected)
        model = self.tensor * self.pipeline * self.context
        if world_size % model:
            raise InputError(
                "parallel",
                f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} = {model} "
                f"in a world of {world_size} processes",
                "a product that divides the number of processes",
            )
        if self.virtual_pipeline is not None and (self.virtual_pipeline < 2 or self.pipeline < 2):
            raise InputError(
                "parallel.virtual_pipeline",
                f"{self.virtual_pipeline} with pipeline {self.pipeline}",
                "2 or more chunks on 2 or more stages, or null",
            )
        if self.sequence and self.tensor == 1:
            raise InputError("parallel.sequence", "true with tensor 1", "tensor parallelism of 2 or more")
        if self.recompute not in ("none", "selective", "full"):
            raise InputError("parallel.recompute", repr(self.recompute), "none, selective or full")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise InputError(
                "parallel.overlap_param_gather", "true", "distributed_optimizer and overlap_grad_reduce to be true too"
            )
        if self.overlap_tensor and not self.sequence:
            raise InputError("parallel.overlap_tensor", "true without parallel.sequence", "sequence parallelism")
        if self.context_communication not in ("p2p", "a2a"):
            raise InputError("parallel.context_communication", repr(self.context_communication), "p2p or a2a")

    def token_shares(self) -> int:
        """Over how many ranks the tokens of a microbatch are cut: each has equally many."""
        return self.context * (self.tensor if self.sequence else 1)


def local_device() -> torch.device:
    """The device of this process: its own GPU under ``torchrun``, else the first one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# The sizes that Megatron's groups were made with; like those groups, one for the process.
_current: dict[str, dict[str, Any]] = {}


def _destroy_groups() -> None:
    """Free the groups of an earlier layout, which Megatron-Core 0.16.1 only forgets: each holds threads or buffers."""
    _forget_fp8_scales()
    groups = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        dist.destroy_process_group(group)


def _forget_fp8_scales() -> None:
    """Have Transformer Engine forget models that are gone: it goes on reducing their delayed scales over old groups."""
    # Without FP8 it is not imported, and need not be.
    engine = sys.modules.get("transformer_engine.pytorch.quantization")
    if engine is not None:
        engine.FP8GlobalStateManager.reset()


def initialize(parallel: ParallelConfig, seed: int = 0) -> None:
    """Build the process groups of a layout and seed the random states of every rank.

    The default group is made once a process. A later call with the same layout keeps all groups; one with another
    layout replaces Megatron's, so that stages of different layouts follow each other in one job.

    Raises:
        InputError: The sizes cannot make a layout of the processes there are, or these cannot find each other.
    """
    parallel.check(world_size())
    ranks = read_ranks()
    check_device(ranks)
    end_with_launcher()
    name_rank()
    on_cpu = enable_cpu_execution()
    minutes = parallel.timeout_minutes + GRACE_MINUTES
    if not dist.is_initialized():
        record_collectives()
        timeout = datetime.timedelta(minutes=minutes)
        backend = "gloo" if on_cpu else "nccl"
        if not on_cpu:
            torch.cuda.set_device(local_device())
        if ranks.launched:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    sizes = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "distributed_timeout_minutes": minutes,
    }
    if _current.get("sizes") != sizes:
        _destroy_groups()
        # Gloo groups beside NCCL's serve ways of saving that are not used here.
        parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
        _current["sizes"] = sizes
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
