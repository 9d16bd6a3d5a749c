"""What log-probs of response tokens take, of memory and time: ``losses.logprobs``, chunk by chunk."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.losses.logprobs import CHUNK_LOGITS
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.batches import FloatArray, Load
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.shapes import Shape

# Bytes that the log-probs move for every logit forward: the product written, its maximum found, the maximum taken off
# and exponentials taken in place, their sum; backward: scaled, and cast to the weight's format. Logits that are made
# again take as much again as forward.
_LOGIT_BYTES, _LOGIT_BYTES_BACKWARD = 28, 14
# Bytes of the fp32 gradient of the output weight that every chunk reads and writes.
CHUNK_GRADIENT_BYTES = 8


@dataclass(frozen=True)
class HeadSeconds:
    """What the last stage takes for the output layer and the loss of each microbatch, both passes, ``[K, R, M]``.

    Attributes:
        products: Matrix products.
        again: Those of logits that are made again.
        elementwise: What is computed of logits.
        tensor: What is sent over the tensor-parallel group.
    """

    products: FloatArray
    again: FloatArray
    elementwise: FloatArray
    tensor: FloatArray

    @property
    def total(self) -> FloatArray:
        """All of them."""
        return self.products + self.again + self.elementwise + self.tensor

    @classmethod
    def none(cls, load: Load) -> "HeadSeconds":
        """A pass whose output layer nobody reads."""
        return cls(*(np.zeros_like(load.tokens) for _ in range(4)))


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of one microbatch on the last pipeline stage.

    Attributes:
        saved: What is kept for the backward pass beside the logits: hidden states of response positions and some
            numbers a token.
        forward_work: The largest temporary of the forward pass.
        work: The largest temporary of forward and backward pass, the buffer of logits included: a chunk of them, of
            their gradient, and the gradients of hidden states and of the whole weight in fp32.
    """

    saved: float
    forward_work: float
    work: float


def vocabulary_rows(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Rows of the output layer on one rank, padding included."""
    return padded_vocab_size(architecture.vocab_size, parallel.tensor) // parallel.tensor


def chunk_tokens(rows: int, device: str) -> int:
    """Tokens whose logits exist at a time, at most."""
    return max(1, CHUNK_LOGITS[device] // rows)


def remade(targets: NDArray[np.float64], rows: int, device: str = "cuda") -> NDArray[np.float64]:
    """Response tokens whose logits the backward pass makes again: of each microbatch all but its last chunk."""
    chunks = np.maximum(1, np.ceil(targets / chunk_tokens(rows, device)))
    size = np.ceil(targets / chunks)
    return np.maximum(0.0, (np.ceil(targets / np.maximum(1, size)) - 1) * size)


def head_rate(numerics: Numerics, hardware: Hardware) -> float:
    """Operations a second of products with the output layer, which FP8 leaves alone."""
    return hardware.matmul_rate("fp32" if numerics.matmul == "fp32" else "bf16")


def logprob_seconds(
    architecture: Architecture,
    parallel: ParallelConfig,
    numerics: Numerics,
    hardware: Hardware,
    load: Load,
    backward: bool,
) -> HeadSeconds:
    """The log-probs of response tokens."""
    rows = vocabulary_rows(architecture, parallel)
    targets = load.targets / parallel.context
    product = 2.0 * rows * architecture.hidden_size / head_rate(numerics, hardware)
    none, moved = np.zeros_like(targets), _LOGIT_BYTES * rows * targets
    if not backward:
        return HeadSeconds(product * targets, none, moved / hardware.memory_rate, none)
    again = remade(targets, rows)
    gradient = np.ceil(targets / chunk_tokens(rows, "cuda")) * rows * architecture.hidden_size * CHUNK_GRADIENT_BYTES
    moved = moved + rows * (_LOGIT_BYTES_BACKWARD * targets + _LOGIT_BYTES * again) + gradient
    return HeadSeconds(3.0 * product * targets, product * again, moved / hardware.memory_rate, none)


def head_bytes(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, shape: Shape, device: str
) -> HeadBytes:
    """What the output layer and its log-probs keep and use of memory on a "cuda" or "cpu" device."""
    element, hidden = numerics.element_bytes, architecture.hidden_size
    targets = shape.targets / parallel.context
    rows = vocabulary_rows(architecture, parallel)
    chunk = min(targets, chunk_tokens(rows, device))
    logits = 4 * chunk * rows
    # The CPU has no product of bf16 with an fp32 result: it copies the inputs, and adds a product of its own.
    copied = device == "cpu" and element < 4
    weight_copy = 4 * rows * hidden if copied else 0
    # Of what is not fp32: the gradient of a chunk of logits, and of the weight, in the weight's own format.
    cast = element * rows * (chunk + hidden) if element < 4 else 0
    return HeadBytes(
        saved=targets * (hidden * element + 8 + 8 + 1 + 4 + 3 * 4),
        forward_work=logits + weight_copy + (4 * chunk * hidden if copied else 0) + 3 * 4 * targets,
        work=logits + weight_copy + cast + 4 * rows * hidden + (targets + chunk) * hidden * element,
    )
