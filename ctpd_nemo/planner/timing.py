"""How long a step takes, estimated from the machine's numbers.

A microbatch passes a stage in the time of its matrix products, its attention, its element-wise kernels and its sums
over the tensor-parallel group, one after the other; the pipeline adds its bubble, the slowest rank makes the others
wait, and behind the last microbatch come gradients and weights over the data-parallel group and the optimizer. What is
taken to overlap is said where it is computed. Nothing here has been fitted to a measured run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.batches import FloatArray, Load
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.head import HeadSeconds, logprob_seconds
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import Parameter, buffer_numel, stage_parameters
from ctpd_nemo.planner.passes import both_passes, empty_microbatch, forward_work

# Bytes of a weight's share of the optimizer's step: gradient, main weight and moments read, the latter three and the
# weight written.
_UPDATE_BYTES = 30
# Share of a microbatch's pass that overlapped gradients, or weights, can hide behind.
_HIDING = 0.8


@dataclass(frozen=True)
class Parts:
    """GPU-seconds of a step by what they go to, as means over the GPUs of a job; their sum is the step's time.

    Attributes:
        compute: Matrix products and attention of the model's forward and backward passes.
        recompute: The same, made again.
        elementwise: Norms, activations, rotations, log-probs beyond their products, kernels' own latency.
        tensor: Sums over tensor-parallel groups, as far as they show.
        context: Keys and values going round context-parallel groups, likewise.
        transfer: Activations and gradients from stage to stage.
        bubble: Stages that have nothing to do yet, or any more, or wait for a slower stage.
        waiting: Ranks that have fewer tokens than the fullest, or none.
        data: Gradients and weights over data-parallel groups, as far as they show.
        update: The optimizer.
        fixed: The same for every step.
    """

    compute: float = 0.0
    recompute: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    transfer: float = 0.0
    bubble: float = 0.0
    waiting: float = 0.0
    data: float = 0.0
    update: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def shares(self) -> dict[str, float]:
        """Each part as a share of the step."""
        return {field.name: getattr(self, field.name) / self.total for field in fields(self)}


def pass_parts(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    load: Load,
    data_ranks: int,
    backward: bool,
    head: HeadSeconds | None = None,
) -> Parts:
    """The microbatches of a step through the pipeline, forward and unless told otherwise backward.

    Args:
        architecture: Of the model.
        parallel: The layout.
        numerics: Number formats.
        hardware: The machine.
        load: The microbatches.
        data_ranks: Data-parallel size; ranks beyond those of ``load`` have none.
        backward: Whether gradients are computed.
        head: What the last stage takes beside its layers; ``None`` for log-probs of response tokens.
    """
    if head is None:
        head = logprob_seconds(architecture, parallel, numerics, hardware, load, backward)
    spent = both_passes(forward_work(architecture, parallel, numerics, hardware, load), parallel, backward)
    transfer_KR = _transfer(architecture, parallel, numerics, hardware, load, backward, data_ranks)
    empty = empty_microbatch(architecture, parallel, numerics, hardware) * (3.0 if backward else 1.0)
    time_KR = _pipeline_time(parallel, spent.total, head.total, load.counts, empty) + transfer_KR
    stages, share = parallel.pipeline, load.tokens.shape[1] / data_ranks

    def mean(values_KRM: FloatArray) -> float:
        return float(values_KRM.sum(axis=2).mean()) * share

    # The head is on one stage; of a mean GPU's time it is a part of that.
    busy = mean(spent.total + head.total / stages)
    transfer, whole = float(transfer_KR.mean()) * share, float(time_KR.mean()) * share
    return Parts(
        compute=mean(spent.compute + head.products / stages),
        recompute=mean(spent.recompute + head.again / stages),
        elementwise=mean(spent.elementwise + head.elementwise / stages),
        tensor=mean(spent.tensor + head.tensor / stages),
        context=mean(spent.context),
        transfer=transfer,
        bubble=whole - busy - transfer,
        waiting=float(time_KR.max(axis=1).mean()) - whole,
    )


def _transfer(
    a: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    load: Load,
    backward: bool,
    data_ranks: int,
) -> FloatArray:
    """Seconds of sends between stages, ``[K, R]``; under the interleaved schedule half of them hide."""
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if stages == 1:
        return np.zeros(load.tokens.shape[:2])
    share = parallel.context * (parallel.tensor if parallel.sequence else 1)
    stride = parallel.tensor * parallel.context * data_ranks
    sent = load.tokens / share * a.hidden_size * numerics.element_bytes / hardware.link_rate(stride, stages)
    sent = sent + (load.tokens > 0) * 2 * hardware.latency_us * 1e-6
    shown = 1.0 if chunks == 1 else 0.5 * chunks
    return (sent * shown * (2 if backward else 1)).sum(axis=2)


def _pipeline_time(
    parallel: ParallelConfig, layers: FloatArray, ending: FloatArray, counts_KR: FloatArray, empty: float
) -> FloatArray:
    """Seconds of a step's microbatches, ``[K, R]``: the slowest stage runs all of them, the others fill and drain.

    With virtual stages the bubble is a chunk's, but microbatches come in groups of as many as there are stages, and
    what a group lacks is filled up with padding as long as a microbatch (``models.forward``). Ranks with fewer
    microbatches than others run ``empty`` ones.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    missing = counts_KR.max(axis=1, keepdims=True) - counts_KR
    whole = (layers + ending).sum(axis=2) + missing * empty
    if stages == 1:
        return whole
    one = layers.sum(axis=2) / np.maximum(1, counts_KR)
    if chunks == 1:
        return whole + (stages - 1) * one
    lacking = -counts_KR % stages
    return whole + lacking * one + (stages - 1) / chunks * one


def update_parts(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    data_ranks: int,
    passes: Parts,
    microbatches: float,
    more: Sequence[Parameter] = (),
) -> Parts:
    """Gradients and weights over the data-parallel group, and the optimizer; the first hide behind ``passes``.

    ``more`` are parameters that the last stage has beside the model's.
    """
    replicas = data_ranks * parallel.context
    numel = max(
        sum(buffer_numel(chunk, replicas, parallel.distributed_optimizer) for chunk in chunks)
        for chunks in (stage_parameters(architecture, parallel, stage, more) for stage in {0, parallel.pipeline - 1})
    )
    data = 0.0
    if replicas > 1:
        rate = hardware.link_rate(parallel.tensor, replicas)
        once = (replicas - 1) / replicas * numel / rate
        latency = hardware.latency_us * 1e-6 * np.log2(replicas)
        gradients, weights = 4 * once + latency, numerics.element_bytes * once + latency
        if not parallel.distributed_optimizer:
            gradients, weights = 8 * once + 2 * latency, 0.0
        # Behind the backward pass of the last microbatch, and the forward pass of the next step's first.
        one = _HIDING * (passes.compute + passes.recompute) / max(1.0, microbatches)
        if parallel.overlap_grad_reduce:
            gradients = max(latency, gradients - one * 2 / 3)
        if parallel.overlap_param_gather:
            weights = max(latency, weights - one / 3)
        data = float(gradients + weights)
    owned = numel / (replicas if parallel.distributed_optimizer else 1)
    # All gradients are set to zero, and the norm of this rank's share is taken.
    moved = owned * (_UPDATE_BYTES + 4) + numel * 4
    return Parts(data=data, update=moved / hardware.memory_rate, fixed=hardware.step_ms * 1e-3)
