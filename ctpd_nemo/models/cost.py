"""What the parts of a model cost in time and memory, from its architecture."""

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.data.cost import SequenceCost


def layer_matrix_parameters(architecture: Architecture) -> int:
    """Weights of the matrices of one layer: query, key, value and output projections, gate, up and down.

    ``W = 2 H (a + g) d + 3 H F`` with hidden size ``H``, ``a`` query heads and ``g`` key heads of width ``d``, and
    feed-forward width ``F``.
    """
    heads = architecture.num_attention_heads + architecture.num_query_groups
    hidden = architecture.hidden_size
    return 2 * hidden * heads * architecture.head_dim + 3 * hidden * architecture.ffn_hidden_size


def sequence_cost(architecture: Architecture) -> SequenceCost:
    """How a sequence's length becomes cost: floating-point operations, over those of the layers' matrices on one token.

    A multiplication by a matrix takes 2 operations a weight and token: ``2 W`` a layer, ``2 V H`` in an output layer
    over ``V`` words. Attention takes ``2 d`` operations a head for the product of a query and a key and as many for
    that of the weight and the value: ``4 a d`` a layer, for each pair of a query and a key. With ``n`` layers::

        attention = 4 a d n / (2 W n) = 2 a d / W
        head      = 2 V H / (2 W n)   = V H / (W n)

    The backward pass takes twice as much of all three, which cancels out.
    """
    layer = layer_matrix_parameters(architecture)
    return SequenceCost(
        attention=2 * architecture.num_attention_heads * architecture.head_dim / layer,
        head=architecture.vocab_size * architecture.hidden_size / (layer * architecture.num_layers),
        window=architecture.sliding_window,
        full_share=len(architecture.full_layers) / architecture.num_layers,
    )


def stage_parameters(architecture: Architecture, tensor: int, pipeline: int, first: bool, last: bool) -> int:
    """Weights of one rank.

    Args:
        architecture: Of the model.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size; stages have equally many layers.
        first: The rank's stage has the embedding.
        last: It has the final norm and the output layer, a copy of its own where the embedding is on another stage.
    """
    a = architecture
    widths = (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
    layer = (layer_matrix_parameters(a) + a.qkv_bias * widths) // tensor
    layer += 2 * a.hidden_size + a.qk_norm * 2 * a.head_dim
    vocabulary = -(-a.vocab_size // tensor) * a.hidden_size
    ends = first * vocabulary + last * a.hidden_size
    if last and not (first and a.tied_embeddings):
        ends += vocabulary
    return layer * (a.num_layers // pipeline) + ends
