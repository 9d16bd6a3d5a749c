"""How long a microbatch takes on a pipeline stage, by what the time goes to."""

from dataclasses import dataclass

import numpy as np

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.batches import BoolArray, FloatArray, Load
from ctpd_nemo.planner.flops import layer_elements
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.parameters import chunk_layers

# Of the backward pass of a layer, the share of its sums over the tensor-parallel group that does not hide behind the
# products of weight gradients; forward, all of it shows.
_SHOWN_BACKWARD = 0.5
# With ``overlap_tensor``, the share of all of them that does not hide behind the products around.
_SHOWN_OVERLAPPED = 0.3
# Of the kernels of a layer, how many more each further context-parallel rank takes: attention goes block by block.
_RING_KERNELS = 0.5


@dataclass(frozen=True)
class Work:
    """Seconds that the layers of a stage take for each microbatch, ``[K, R, M]``."""

    compute: FloatArray
    attention: FloatArray
    elementwise: FloatArray
    tensor: FloatArray
    context: FloatArray

    @property
    def total(self) -> FloatArray:
        """All of them."""
        return self.compute + self.attention + self.elementwise + self.tensor + self.context


@dataclass(frozen=True)
class Spent:
    """Seconds that the layers of a stage take for each microbatch, forward and backward, ``[K, R, M]``."""

    compute: FloatArray
    recompute: FloatArray
    elementwise: FloatArray
    tensor: FloatArray
    context: FloatArray

    @property
    def total(self) -> FloatArray:
        """All of them."""
        return self.compute + self.recompute + self.elementwise + self.tensor + self.context


def both_passes(work: Work, parallel: ParallelConfig, backward: bool) -> Spent:
    """Both passes from the forward one: backward two products for one, five for two in attention, twice the bytes."""
    none = np.zeros_like(work.compute)
    if not backward:
        return Spent(work.compute + work.attention, none, work.elementwise, work.tensor, work.context)
    recompute, again = none, 0.0
    if parallel.recompute == "selective":
        recompute = work.attention
    elif parallel.recompute == "full":
        recompute, again = work.compute + work.attention, 1.0
    return Spent(
        compute=3.0 * work.compute + 3.5 * work.attention,
        recompute=recompute,
        elementwise=(3.0 + again) * work.elementwise,
        tensor=(1 + _SHOWN_BACKWARD + again) * work.tensor,
        context=3.0 * work.context,
    )


def forward_work(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, hardware: Hardware, load: Load
) -> Work:
    """A forward pass; all of a stage's chunks where there are several.

    Args:
        architecture: Of the model.
        parallel: The layout.
        numerics: Number formats.
        hardware: The machine.
        load: The microbatches.
    """
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
    return Work(
        compute=compute,
        attention=attention,
        elementwise=elementwise,
        tensor=layers * _sums(a, parallel, numerics, hardware, tokens, there),
        context=np.maximum(0.0, _ring(a, parallel, numerics, hardware, tokens, layers) - attention),
    )


def _seconds_per_operation(numerics: Numerics, hardware: Hardware) -> float:
    """Of the products of the layers, some of which may stay in bf16."""
    rest = "fp32" if numerics.matmul == "fp32" else "bf16"
    return numerics.fp8_share / hardware.matmul_rate("fp8") + (1 - numerics.fp8_share) / hardware.matmul_rate(rest)


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


def empty_microbatch(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, hardware: Hardware
) -> float:
    """Seconds of a forward pass without tokens to speak of: weights are read and kernels started all the same."""
    one, none = np.ones((1, 1, 1)), np.zeros((1, 1, 1))
    return float(forward_work(architecture, parallel, numerics, hardware, Load(one, none, one, one, one)).total.sum())
