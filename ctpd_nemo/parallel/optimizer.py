"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, and their face towards Lightning."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.agreement import any_rank
from ctpd_nemo.parallel.cpu import cuda_type_names
from ctpd_nemo.parallel.layout import ParallelConfig


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Learning rate after warm-up.
        min_lr: Learning rate at the last step.
        schedule: "cosine", "linear" or "constant".
        warmup_fraction: Share of all steps over which the learning rate rises from zero.
        weight_decay: Decoupled weight decay; biases and norms have none.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        clip_grad: Largest norm of the whole gradient; 0 for no clipping.
    """

    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 1.0

    def check(self) -> None:
        """Stop with an ``InputError`` where a value makes no schedule."""
        if self.schedule not in ("cosine", "linear", "constant"):
            raise InputError("optim.schedule", repr(self.schedule), "cosine, linear or constant")
        if not math.inf > self.lr >= self.min_lr >= 0:
            raise InputError("optim.lr", f"{self.lr} with optim.min_lr {self.min_lr}", "inf > lr >= min_lr >= 0")
        for name in ("weight_decay", "eps", "clip_grad"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"optim.{name}", str(getattr(self, name)), "a finite number, 0 or more")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError("optim.warmup_fraction", str(self.warmup_fraction), "a share from 0 to below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError("optim.betas", str(list(self.betas)), "two rates from 0 to below 1")


def wrap_data_parallel(chunks: list[GPTModel], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Megatron's ``DistributedDataParallel`` around each model chunk: one fp32 gradient buffer, reduced once a step."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=ddp_config,
            module=chunk,
            # Later chunks of a virtual pipeline reduce while earlier ones still run; buckets would not overlap.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Callable]) -> Any:
    """The schedules take one function without a virtual pipeline, and a list with one."""
    return functions[0] if len(functions) == 1 else functions


def build_optimizer(
    chunks: list[DistributedDataParallel],
    optim: OptimConfig,
    parallel: ParallelConfig,
    total_steps: int,
    own_rates: Mapping[str, float] | None = None,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the chunks' parameters, fp32 main copies included, and its schedule over ``total_steps`` steps.

    Args:
        chunks: This rank's chunks in their wrappers.
        optim: Rates and decay.
        parallel: The layout.
        total_steps: Steps of the run.
        own_rates: Learning rate after warm-up of parameters whose names match a pattern, in place of ``optim.lr``; it
            ends at the share of it at which the others end.
    """
    optim.check()
    config = chunks[0].config
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(megatron_config)
    for pattern, rate in (own_rates or {}).items():
        last = rate * optim.min_lr / optim.lr if optim.lr else rate
        own = {"max_lr": rate, "min_lr": last, "is_decoupled_lr": True}
        # Groups of a checkpoint are found again by their multipliers and by this mark; rates tell none apart.
        overrides[ParamKey(name=pattern)] = ParamGroupOverride(**own)  # type: ignore[typeddict-item]
    with cuda_type_names():
        optimizer = get_megatron_optimizer(megatron_config, chunks, overrides, use_gloo_process_groups=False)
    if config.bf16:
        config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=int(optim.warmup_fraction * total_steps),
        lr_decay_steps=max(1, total_steps),
        lr_decay_style=optim.schedule,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max(1, total_steps),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


class LightningOptimizer(torch.optim.Optimizer):
    """Megatron's optimizer as Lightning sees it, so that Lightning counts its steps as its own.

    One ``step`` is the whole update: gradient clipping, the optimizer's step and the schedule's.

    Attributes:
        grad_norm: Norm of the whole gradient at the last step, before clipping.
        updated: Whether the last step changed the parameters; equal on every rank of the job.
    """

    def __init__(self, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
        # The base class would build parameter groups and state of its own; Megatron's are the ones there are.
        self.megatron = optimizer
        self.scheduler = scheduler
        self.defaults: dict[str, Any] = {}
        self.grad_norm = 0.0
        self.updated = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Megatron's parameter groups."""
        return self.megatron.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """Empty: optimizer state is sharded and saved by ``parallel.checkpoint``."""
        return {}

    @property
    def lr(self) -> float:
        """The learning rate that the next step uses."""
        return self.param_groups[0]["lr"]

    def step(self, closure: Callable[[], Any] | None = None, sound: bool = True) -> Any:  # type: ignore[override]
        """Update the parameters from the accumulated gradients, and advance the schedule by one step.

        Where the norm of the gradient is not finite, parameters and moments stay as they are on every rank, as Megatron
        leaves them where fp16 overflows; the schedule goes on.

        Args:
            closure: Called first.
            sound: False on any rank leaves parameters and moments as they are, too.
        """
        result = closure() if closure is not None else None
        # The parts of Megatron's own step, which applies what clipping by NaN or infinity leaves.
        self.megatron.prepare_grads()
        self.grad_norm = float(self.megatron.get_grad_norm() or 0.0)
        self.updated = not any_rank(not (sound and math.isfinite(self.grad_norm)))
        if self.updated:
            self._clip()
            self.megatron.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return result

    def _clip(self) -> None:
        """Scale the gradients down where their norm is too large."""
        for part in getattr(self.megatron, "chained_optimizers", [self.megatron]):
            # A rank may have nothing to update of a group of parameters.
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                with cuda_type_names():
                    clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, self.grad_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; Megatron's gradient buffers are cleared by the model (``zero_grad_buffer``)."""
        self.megatron.zero_grad(set_to_none)
