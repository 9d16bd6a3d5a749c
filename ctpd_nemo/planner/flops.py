r"""Floating-point operations of a microbatch, over all ranks of one replica.

A product of an ``[m, k]`` and a ``[k, n]`` matrix counts ``2 m k n``. Per token a layer has
:math:`2 P` of them forward, :math:`P` its matrix elements, and twice that backward. Attention has two products of
``head_dim`` for every pair of tokens of which one sees the other, exactly counted, and four backward. The output layer
runs at response positions only.

*Model* operations are those that the mathematics needs; *hardware* operations are those that run: the backward pass of
fused attention makes the scores again, log-probs make the logits of all but a last chunk again, recomputation makes
layers again, and the local attention fills in what the causal mask then hides.
"""

from dataclasses import dataclass

import numpy as np

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.head import remade, vocabulary_rows
from ctpd_nemo.planner.shapes import Shape


@dataclass(frozen=True)
class Flops:
    """Operations by what they are for.

    Attributes:
        layers: The products of the layers with their weights.
        attention: Scores and their products with values.
        head: The output layer.
    """

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.head

    def scaled(self, layers: float, attention: float, head: float) -> "Flops":
        """Each multiplied by a number of its own."""
        return Flops(self.layers * layers, self.attention * attention, self.head * head)


def layer_elements(architecture: Architecture) -> int:
    """Elements of the weight matrices of one layer."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    return a.hidden_size * (2 * queries + 2 * keys + 3 * a.ffn_hidden_size)


def _forward(architecture: Architecture, tokens: int, scores: int, targets: int, vocabulary: int) -> Flops:
    a = architecture
    return Flops(
        layers=2.0 * a.num_layers * layer_elements(a) * tokens,
        attention=4.0 * a.num_layers * a.num_attention_heads * a.head_dim * scores,
        head=2.0 * vocabulary * a.hidden_size * targets,
    )


def model_flops(architecture: Architecture, shape: Shape, backward: bool = True) -> Flops:
    """Operations that the mathematics needs."""
    forward = _forward(architecture, shape.tokens, shape.attended, shape.targets, architecture.vocab_size)
    return forward.scaled(3.0, 3.0, 3.0) if backward else forward


def hardware_flops(
    architecture: Architecture,
    parallel: ParallelConfig,
    shape: Shape,
    backward: bool = True,
    device: str = "cuda",
    microbatches: float = 1.0,
) -> Flops:
    """Operations that run; ``shape`` may be the sum of several microbatches."""
    rows = padded_vocab_size(architecture.vocab_size, parallel.tensor)
    forward = _forward(architecture, shape.tokens, shape.scored, shape.targets, rows)
    if not backward:
        return forward
    layers, attention = {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[parallel.recompute]
    targets = np.array(shape.targets / max(microbatches, 1) / parallel.context)
    again = float(remade(targets, vocabulary_rows(architecture, parallel), device) / np.maximum(targets, 1))
    return forward.scaled(3.0 + layers, 3.5 + attention, 3.0 + again)
