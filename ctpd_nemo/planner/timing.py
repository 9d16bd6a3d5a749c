"""How long a step takes, estimated from the machine's numbers.

A microbatch passes a stage in the time of its matrix products, its attention, its element-wise kernels and its sums
over the tensor-parallel group, one after the other; the pipeline adds its bubble, the slowest rank makes the others
wait, and behind the last microbatch come gradients and weights over the data-parallel group and the optimizer. What is
taken to overlap is said where it is computed. Nothing here has been fitted to a measured run.
"""

from dataclasses import dataclass, fields

import numpy as np

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.batches import BoolArray, FloatArray, Load
from ctpd_nemo.planner.flops import layer_elements
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.head import chunk_tokens, remade, vocabulary_rows
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import buffer_numel, chunk_layers, stage_parameters

# Bytes that the log-probs move for every logit forward: the product written, its maximum found, the maximum taken off
# and exponentials taken in place, their sum; backward: scaled, and cast to the weight's format. Logits that are made
# again take as much again as forward (``losses.logprobs``).
_LOGIT_BYTES, _LOGIT_BYTES_BACKWARD = 28, 14
# Bytes of the fp32 gradient of the output weight that every chunk reads and writes.
_CHUNK_GRADIENT_BYTES = 8
# Bytes of a weight's share of the optimizer's step: gradient, main weight and moments read, the latter three and the
# weight written.
_UPDATE_BYTES = 30
# Of the backward pass of a layer, the share of its sums over the tensor-parallel group that does not hide behind the
# products of weight gradients; forward, all of it shows.
_SHOWN_BACKWARD = 0.5
# With ``overlap_tensor``, the share of all of them that does not hide behind the products around.
_SHOWN_OVERLAPPED = 0.3
# Of the kernels of a layer, how many more each further context-parallel rank takes: attention goes block by block.
_RING_KERNELS = 0.5
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


@dataclass(frozen=True)
class _Work:
    """Seconds that each microbatch takes on a stage, ``[K, R, M]``; the head's come on top on the last stage."""

    compute: FloatArray
    attention: FloatArray
    elementwise: FloatArray
    tensor: FloatArray
    context: FloatArray
    head: FloatArray
    head_again: FloatArray
    head_elementwise: FloatArray
    head_backward: FloatArray

    @property
    def layers(self) -> FloatArray:
        """All but the head."""
        return self.compute + self.attention + self.elementwise + self.tensor + self.context


def pass_parts(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    load: Load,
    data_ranks: int,
    backward: bool,
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
    """
    work = _forward(architecture, parallel, numerics, hardware, load)
    # Backward: two products for one, five for two in attention, and as many bytes again, twice.
    factor = {"compute": 3.0, "attention": 3.5, "elementwise": 3.0, "tensor": 1 + _SHOWN_BACKWARD, "context": 3.0}
    if not backward:
        factor = dict.fromkeys(factor, 1.0)
    compute = factor["compute"] * work.compute + factor["attention"] * work.attention
    head = (3.0 if backward else 1.0) * work.head
    head_again = work.head_again if backward else np.zeros_like(head)
    head_elementwise = work.head_elementwise + (work.head_backward if backward else 0.0)
    recompute = np.zeros_like(work.compute)
    elementwise, tensor = factor["elementwise"] * work.elementwise, factor["tensor"] * work.tensor
    if backward and parallel.recompute == "full":
        recompute = work.compute + work.attention
        elementwise, tensor = elementwise + work.elementwise, tensor + work.tensor
    elif backward and parallel.recompute == "selective":
        recompute = work.attention
    context = factor["context"] * work.context
    layers = compute + recompute + elementwise + tensor + context
    ending = head + head_again + head_elementwise
    transfer = _transfer(architecture, parallel, numerics, hardware, load, backward, data_ranks)
    stages = parallel.pipeline
    busy_KR = (layers + ending / stages).sum(axis=2)
    empty = _empty_microbatch(architecture, parallel, numerics, hardware) * (3.0 if backward else 1.0)
    time_KR = _pipeline_time(parallel, layers, ending, load.counts, empty) + transfer
    slowest = float(time_KR.max(axis=1).mean())
    share = load.tokens.shape[1] / data_ranks

    def mean(values_KRM: FloatArray) -> float:
        return float(values_KRM.sum(axis=2).mean()) * share

    return Parts(
        compute=mean(compute + head / stages),
        recompute=mean(recompute + head_again / stages),
        elementwise=mean(elementwise + head_elementwise / stages),
        tensor=mean(tensor),
        context=mean(context),
        transfer=float(transfer.mean()) * share,
        bubble=float((time_KR - busy_KR - transfer).mean()) * share,
        waiting=slowest - float(time_KR.mean()) * share,
    )


def _forward(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, hardware: Hardware, load: Load
) -> _Work:
    a, element = architecture, numerics.element_bytes
    layers = chunk_layers(a, parallel) * (parallel.virtual_pipeline or 1)
    there = load.tokens > 0
    tokens = load.tokens / parallel.context
    elements = layers * layer_elements(a) / parallel.tensor
    products = 2.0 * elements * tokens * _seconds_per_operation(numerics, hardware)
    # Few tokens: reading the weights takes longer than multiplying with them.
    compute = np.maximum(products, there * elements * element / hardware.memory_rate)
    heads = a.num_attention_heads * a.head_dim / parallel.tensor
    attention = 4.0 * layers * heads * load.scored / parallel.context / hardware.attention_rate
    # Norms read and write, sums with the residual stream read twice and write; rotations; gate times up.
    positions = tokens / (parallel.tensor if parallel.sequence else 1)
    width = (a.num_query_groups * a.head_dim + a.num_attention_heads * a.head_dim) * 2 + 3 * a.ffn_hidden_size
    moved = layers * element * (10 * positions * a.hidden_size + tokens * width / parallel.tensor)
    started = layers * (1 + _RING_KERNELS * (parallel.context - 1)) * hardware.layer_us * 1e-6
    elementwise = moved / hardware.memory_rate + there * started
    rows = vocabulary_rows(a, parallel)
    targets = load.targets / parallel.context
    again = remade(targets, rows)
    head_rate = hardware.matmul_rate("fp32" if numerics.matmul == "fp32" else "bf16")
    chunks = np.ceil(targets / chunk_tokens(rows, "cuda"))
    gradient = chunks * rows * a.hidden_size * _CHUNK_GRADIENT_BYTES
    return _Work(
        compute=compute,
        attention=attention,
        elementwise=elementwise,
        tensor=layers * _sums(a, parallel, numerics, hardware, tokens, there),
        context=np.maximum(0.0, _ring(a, parallel, numerics, hardware, tokens, layers) - attention),
        head=2.0 * rows * a.hidden_size * targets / head_rate,
        head_again=2.0 * rows * a.hidden_size * again / head_rate,
        head_elementwise=_LOGIT_BYTES * rows * targets / hardware.memory_rate,
        head_backward=(rows * (_LOGIT_BYTES_BACKWARD * targets + _LOGIT_BYTES * again) + gradient)
        / hardware.memory_rate,
    )


def _seconds_per_operation(numerics: Numerics, hardware: Hardware) -> float:
    """Of the products of the layers, some of which may stay in bf16."""
    rest = "fp32" if numerics.matmul == "fp32" else "bf16"
    return numerics.fp8_share / hardware.matmul_rate("fp8") + (1 - numerics.fp8_share) / hardware.matmul_rate(rest)


def _empty_microbatch(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, hardware: Hardware
) -> float:
    """Seconds of a forward pass without tokens to speak of: weights are read and kernels started all the same."""
    one, none = np.ones((1, 1, 1)), np.zeros((1, 1, 1))
    return float(_forward(architecture, parallel, numerics, hardware, Load(one, none, one, one, one)).layers.sum())


def _sums(
    a: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    tokens: FloatArray,
    there: BoolArray,
) -> FloatArray:
    """Seconds of the two sums of one layer's forward pass over the tensor-parallel group."""
    size = parallel.tensor
    if size == 1:
        return np.zeros_like(tokens)
    wire = 2 * (size - 1) / size * tokens * a.hidden_size * numerics.element_bytes
    calls = 4 if parallel.sequence else 2
    shown = _SHOWN_OVERLAPPED if parallel.overlap_tensor else 1.0
    return 2 * shown * wire / hardware.link_rate(1, size) + there * calls * hardware.latency_us * 1e-6


def _ring(
    a: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    tokens: FloatArray,
    layers: int,
) -> FloatArray:
    """Seconds that keys and values take once round the context-parallel group; attention hides them where it can."""
    if parallel.context == 1:
        return np.zeros_like(tokens)
    block = tokens * 2 * a.num_query_groups * a.head_dim / parallel.tensor * numerics.element_bytes
    rate = hardware.link_rate(parallel.tensor, parallel.context)
    # Heads for tokens and back ("a2a") moves about as much, once.
    return layers * (parallel.context - 1) * (block / rate + (tokens > 0) * hardware.latency_us * 1e-6)


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
) -> Parts:
    """Gradients and weights over the data-parallel group, and the optimizer; the first hide behind ``passes``."""
    replicas = data_ranks * parallel.context
    numel = max(
        sum(buffer_numel(chunk, replicas, parallel.distributed_optimizer) for chunk in chunks)
        for chunks in (stage_parameters(architecture, parallel, stage) for stage in {0, parallel.pipeline - 1})
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
