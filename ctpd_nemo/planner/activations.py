"""What a layer keeps between its forward and its backward pass, tensor by tensor.

Two kinds of layer. ``local`` is what runs without Transformer Engine (``parallel.layers``): plain norms that keep fp32
copies, attention over a padded batch, an unfused SwiGLU. It is checked against counted storages. ``fused`` is
Transformer Engine's: fused norms and linear layers, flash attention on packed sequences, a fused SwiGLU. It
follows the ``save_for_backward`` calls of Transformer Engine 2 and Megatron-Core 0.16 in outline, and has not been
compared with a GPU.
"""

from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.numerics import Numerics
from ctpd_nemo.planner.shapes import Shape

# Megatron-Core keeps the rotary table of this many lengths (``RotaryEmbedding.forward``).
_ROTARY_TABLES = 32


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer and microbatch on one rank.

    Attributes:
        input: The layer's input: all that stays of a layer that is recomputed as a whole.
        attention: What core attention alone keeps: all that is recomputed under "selective".
        attention_inputs: What its recomputation starts from, beyond what the rest keeps anyway.
        before_mlp: All that the layer keeps from its input up to and including the attention's output, without the two
            above.
        mlp: All that it keeps behind that.
        work: The largest temporary of its backward pass.
        forward_work: The largest temporary of a forward pass that keeps nothing.
        output: Of its output, and of the gradient that comes back.
        gathered: Of a hidden state that sequence parallelism has gathered; 0 without.
    """

    input: float
    attention: float
    attention_inputs: float
    before_mlp: float
    mlp: float
    work: float
    forward_work: float
    output: float
    gathered: float

    @property
    def whole(self) -> float:
        """Nothing is recomputed."""
        return self.before_mlp + self.attention_inputs + self.attention + self.mlp

    @property
    def without_attention(self) -> float:
        """Core attention is recomputed."""
        return self.before_mlp + self.attention_inputs + self.mlp


@dataclass(frozen=True)
class _Widths:
    """Elements a token of one rank's share, tokens of one rank, and ranks that the tokens are cut over."""

    context: int
    hidden: int
    queries: int
    keys: int
    heads: int
    groups: int
    ffn: int
    tokens: float
    norm_tokens: float


def _widths(architecture: Architecture, parallel: ParallelConfig, shape: Shape) -> _Widths:
    tensor = parallel.tensor
    tokens = shape.tokens / parallel.context
    return _Widths(
        context=parallel.context,
        hidden=architecture.hidden_size,
        queries=architecture.num_attention_heads * architecture.head_dim // tensor,
        keys=architecture.num_query_groups * architecture.head_dim // tensor,
        heads=architecture.num_attention_heads // tensor,
        groups=architecture.num_query_groups // tensor,
        ffn=architecture.ffn_hidden_size // tensor,
        tokens=tokens,
        # Norms and the residual stream: each rank has a share of the positions under sequence parallelism.
        norm_tokens=tokens / tensor if parallel.sequence else tokens,
    )


def layer_bytes(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, shape: Shape, attention: str
) -> LayerBytes:
    """What one layer keeps and uses of memory.

    Args:
        architecture: Of the model.
        parallel: The layout.
        numerics: Number formats.
        shape: Of the microbatch.
        attention: "local" or "fused".
    """
    widths = _widths(architecture, parallel, shape)
    if attention == "local":
        return _local_layer(architecture, numerics, widths, shape)
    return _fused_layer(architecture, numerics, widths)


def _local_norm(rows: float, width: float) -> float:
    """``torch.nn.RMSNorm`` on the CPU keeps its input in fp32, the same normalised, and a root mean square a row."""
    return rows * (2 * 4 * width + 4)


def _local_layer(architecture: Architecture, numerics: Numerics, w: _Widths, shape: Shape) -> LayerBytes:
    element = numerics.element_bytes
    stream = w.norm_tokens * w.hidden * element
    tables = 4 * w.tokens * architecture.head_dim * element
    qk_norm = 0.0
    if architecture.qk_norm:
        qk_norm = _local_norm(w.tokens * w.heads, architecture.head_dim)
        qk_norm += _local_norm(w.tokens * w.groups, architecture.head_dim)
        if element == 4:
            # In fp32 no copy is made: the key is a view of what is kept anyway.
            qk_norm -= w.tokens * w.keys * 4
    padded = shape.sequences * shape.longest
    attention: float = padded * ((2 * w.queries + 2 * w.keys) * element + 4 * w.heads) + 8 * shape.tokens
    # Rotated queries and keys; the joint product that the values are a view of.
    inputs = w.tokens * (2 * w.queries + 3 * w.keys) * element
    if w.context > 1:
        # Whole sequences are gathered from all ranks, put in order, and of the result this rank's tokens are kept.
        attention += shape.tokens * (w.queries + 2 * w.keys) * element + 8 * (shape.tokens + w.tokens) - inputs
    norm = _local_norm(w.norm_tokens, w.hidden)
    gathered = w.tokens * w.hidden * element if w.norm_tokens < w.tokens else 0.0
    return LayerBytes(
        input=stream,
        attention=attention,
        attention_inputs=inputs,
        before_mlp=norm + stream + tables + qk_norm + w.tokens * w.queries * element,
        # The joint product of gate and up, the gate's activation, up, and their product.
        mlp=norm + stream + 5 * w.tokens * w.ffn * element,
        work=stream + 2 * gathered + 2 * w.tokens * w.ffn * element,
        # Gate and up, their parts and product; and the residual stream in the hands of every caller.
        forward_work=5 * stream + 5 * w.tokens * w.ffn * element,
        output=stream,
        gathered=gathered,
    )


def _fused_layer(architecture: Architecture, numerics: Numerics, w: _Widths) -> LayerBytes:
    element, kept = numerics.element_bytes, numerics.input_bytes
    stream = w.norm_tokens * w.hidden * element
    norm = stream + 4 * w.norm_tokens + w.norm_tokens * w.hidden * kept
    qk_norm = 0.0
    if architecture.qk_norm:
        # The query that goes into its norm, the joint product that the key is a view of, and a root mean square a head.
        qk_norm = w.tokens * ((2 * w.queries + 2 * w.keys) * element + 4 * (w.heads + w.groups))
    # Flash attention keeps its output, which in bf16 is also the next layer's input, and one number a head and token.
    output = w.tokens * w.queries * element
    copied = w.tokens * w.queries * kept if kept != element else 0.0
    whole = w.tokens * w.hidden * element
    gathered = whole if w.norm_tokens < w.tokens else 0.0
    return LayerBytes(
        input=stream,
        attention=4 * w.tokens * w.heads,
        attention_inputs=w.tokens * (w.queries + 2 * w.keys) * element,
        before_mlp=norm + qk_norm + output + copied,
        mlp=norm + w.tokens * (2 * w.ffn * element + w.ffn * kept),
        # Gradients of gate and up and of their product, of the layer's input, and of the largest weight.
        work=stream + gathered + whole + (3 * w.tokens + 2 * w.hidden) * w.ffn * element,
        forward_work=3 * stream + whole + 3 * w.tokens * w.ffn * element,
        output=stream,
        gathered=gathered,
    )


def final_norm_bytes(
    architecture: Architecture, parallel: ParallelConfig, numerics: Numerics, shape: Shape, attention: str
) -> float:
    """What the norm behind the last layer keeps."""
    w = _widths(architecture, parallel, shape)
    if attention == "local":
        return _local_norm(w.norm_tokens, w.hidden)
    return w.norm_tokens * (w.hidden * numerics.element_bytes + 4)


def rotary_bytes(architecture: Architecture, shape: Shape) -> float:
    """The tables of rotary angles, fp32, of as many lengths as are kept."""
    return _ROTARY_TABLES * shape.longest * architecture.head_dim * 4
