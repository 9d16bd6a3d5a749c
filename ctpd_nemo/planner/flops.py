r"""Floating-point operations of a microbatch, over all ranks of one replica.

A product of an ``[m, k]`` and a ``[k, n]`` matrix counts ``2 m k n``. Per token a layer has
:math:`2 P` of them forward, :math:`P` its matrix elements, and twice that backward. Attention has two products of
``head_dim`` for every pair of tokens of which one sees the other, exactly counted, and four backward. The output layer
runs at response positions only.

*Model* operations are those that the mathematics needs; *hardware* operations are those that run: the backward pass of
fused attention makes the scores again, log-probs make their logits again, recomputation makes layers again, and the
local attention fills in what the causal mask then hides.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.activations import Shape


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


def attended_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """Pairs of tokens of which one sees the other, over causal sequences.

    Args:
        lengths: Tokens of each sequence.
        window: Tokens that each token sees at most, itself included.
    """
    total = 0
    for length in lengths:
        seen = length if window is None else min(window, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def forward_flops(architecture: Architecture, shape: Shape, vocabulary: int | None = None) -> Flops:
    """Operations of a forward pass as the mathematics needs it; ``vocabulary`` counts rows that pad it, too."""
    a = architecture
    rows = a.vocab_size if vocabulary is None else vocabulary
    return Flops(
        layers=2.0 * a.num_layers * layer_elements(a) * shape.tokens,
        attention=4.0 * a.num_layers * a.num_attention_heads * a.head_dim * shape.attended,
        head=2.0 * rows * a.hidden_size * shape.targets,
    )


def model_flops(architecture: Architecture, shape: Shape, backward: bool = True) -> Flops:
    """Operations that the mathematics needs."""
    forward = forward_flops(architecture, shape)
    return forward.scaled(3.0, 3.0, 3.0) if backward else forward


def hardware_flops(
    architecture: Architecture,
    parallel: ParallelConfig,
    shape: Shape,
    attention: str = "fused",
    backward: bool = True,
) -> Flops:
    """Operations that run."""
    if attention == "local":
        attended = shape.sequences * shape.longest**2
        shape = Shape(shape.tokens, shape.targets, shape.sequences, shape.longest, attended)
    forward = forward_flops(architecture, shape, padded_vocab_size(architecture.vocab_size, parallel.tensor))
    if not backward:
        return forward
    again = {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[parallel.recompute]
    return forward.scaled(3.0 + again[0], 3.5 + again[1], 4.0)
