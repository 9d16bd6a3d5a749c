"""What log-probs of response tokens take: ``losses.logprobs``, chunk by chunk."""

from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.losses.logprobs import CHUNK_LOGITS
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.shapes import Shape


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of one microbatch on the last pipeline stage.

    Attributes:
        saved: What is kept for the backward pass: hidden states of response positions and some numbers a token.
        forward_work: The largest temporary of the forward pass.
        work: The largest temporary of forward and backward pass: a chunk of logits, gradients of hidden states and of
            the whole weight in fp32.
    """

    saved: float
    forward_work: float
    work: float


def head_bytes(architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, shape: Shape) -> HeadBytes:
    """What the output layer and its log-probs keep and use of memory."""
    element, hidden = numerics.element_bytes, architecture.hidden_size
    targets = shape.targets / parallel.context
    rows = padded_vocab_size(architecture.vocab_size, parallel.tensor) // parallel.tensor
    chunk = min(targets, max(1, CHUNK_LOGITS // rows))
    # Logits in fp32, and where the product is not, the product beside them; likewise their gradient.
    logits = chunk * rows * (4 if element == 4 else 4 + element)
    numbers = targets * (8 + 8 + 1 + 4)
    weight_gradient = rows * hidden * (4 if element == 4 else 4 + element)
    return HeadBytes(
        saved=targets * hidden * element + numbers,
        forward_work=logits + 3 * 4 * targets,
        work=logits + weight_gradient + targets * (hidden * element + 3 * 4),
    )
