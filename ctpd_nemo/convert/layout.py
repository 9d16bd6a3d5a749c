"""Of which rows of which Hugging Face tensors each Megatron-Core parameter is made.

One table serves both ways: loading reads the rows a rank owns, export puts them back. Parameters go by the names that
Megatron-Core's checkpoints use, with the number of the layer in the whole model:
``decoder.layers.7.mlp.linear_fc1.weight``.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"

# Transformer Engine fuses these norms into the linear layer that follows, and Megatron-Core's checkpoints use the fused
# names; the local layers keep the norms apart.
_FUSED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

# Parameter of a layer -> (how tensor parallelism splits it, the Hugging Face tensors of the layer it is made of).
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER_RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attention.linear_qkv.layer_norm_weight": ("replicated", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"{name}.weight" for name in _QKV)),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"{name}.bias" for name in _QKV)),
    "self_attention.q_layernorm.weight": ("replicated", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("replicated", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": ("row parallel", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("replicated", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": ("gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("row parallel", ("mlp.down_proj.weight",)),
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Block:
    """Rows ``[start, stop)`` of a Hugging Face tensor, and the columns of them where only some are meant."""

    tensor: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


def canonical_name(name: str, first_layer: int = 0) -> str:
    """The checkpoint name of a ``GPTModel`` parameter.

    Args:
        name: As ``named_parameters`` gives it, under Transformer Engine's or the local layer spec.
        first_layer: The number, in the whole model, of the chunk's first layer.
    """
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    return layer_name(first_layer + int(layer[1]), _FUSED_NAMES.get(layer[2], layer[2]))


def layer_name(layer: int, parameter: str) -> str:
    """The checkpoint name of a parameter of one layer; ``layer`` counts from 0 over the whole model."""
    return f"decoder.layers.{layer}.{parameter}"


def layer_parameters(architecture: Architecture) -> list[str]:
    """The parameters that each layer has, in order."""
    absent = set()
    if not architecture.qkv_bias:
        absent.add("self_attention.linear_qkv.bias")
    if not architecture.qk_norm:
        absent.update(("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"))
    return [name for name in _LAYER_RULES if name not in absent]


def megatron_parameters(architecture: Architecture) -> list[str]:
    """All parameters of the model, in order. A tied output layer is the embedding and not named again."""
    layers = [
        layer_name(layer, parameter)
        for layer in range(architecture.num_layers)
        for parameter in layer_parameters(architecture)
    ]
    return [EMBEDDING, *layers, FINAL_NORM, *([] if architecture.tied_embeddings else [OUTPUT])]


@functools.cache
def hf_tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face folder and its shape."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (queries, a.hidden_size),
        "self_attn.k_proj.weight": (keys, a.hidden_size),
        "self_attn.v_proj.weight": (keys, a.hidden_size),
        "self_attn.o_proj.weight": (a.hidden_size, queries),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "mlp.gate_proj.weight": (a.ffn_hidden_size, a.hidden_size),
        "mlp.up_proj.weight": (a.ffn_hidden_size, a.hidden_size),
        "mlp.down_proj.weight": (a.hidden_size, a.ffn_hidden_size),
    }
    if a.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (queries,), "self_attn.k_proj.bias": (keys,)}
        layer |= {"self_attn.v_proj.bias": (keys,)}
    if a.qk_norm:
        layer |= {"self_attn.q_norm.weight": (a.head_dim,), "self_attn.k_norm.weight": (a.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {HF_EMBEDDING: (a.vocab_size, a.hidden_size)}
    for number in range(a.num_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tied_embeddings:
        shapes[HF_OUTPUT] = (a.vocab_size, a.hidden_size)
    return shapes


def shard_blocks(
    parameter: str,
    architecture: Architecture,
    tp_rank: int = 0,
    tp_size: int = 1,
    padded_vocab_size: int | None = None,
) -> list[Block]:
    """The blocks that, one below the other, are a tensor-parallel rank's share of a parameter.

    Args:
        parameter: A name of :func:`megatron_parameters`, or ``output_layer.weight`` of a tied model's last stage.
        architecture: Of the model.
        tp_rank: Rank in the tensor-parallel group.
        tp_size: Size of the tensor-parallel group.
        padded_vocab_size: Rows of the vocabulary over all ranks; the rows beyond ``vocab_size`` are in no block.

    Raises:
        KeyError: The model has no parameter of this name.
        ValueError: A size that ``tp_size`` does not divide.
    """
    split, tensors = _rule(parameter, architecture)
    shapes = hf_tensor_shapes(architecture)
    rows = shapes[tensors[0]][0]
    if split == "replicated":
        return [Block(tensors[0], (0, rows))]
    if split == "vocabulary":
        start, stop = _share(padded_vocab_size or rows, tp_rank, tp_size)
        return [Block(tensors[0], (start, min(stop, rows)))] if start < rows else []
    if split == "row parallel":
        return [Block(tensors[0], (0, rows), _share(shapes[tensors[0]][1], tp_rank, tp_size))]
    if split == "gated":
        return [Block(tensor, _share(rows, tp_rank, tp_size)) for tensor in tensors]
    total = sum(shapes[tensor][0] for tensor in tensors)
    return list(_cut(_qkv_by_group(architecture, tensors), *_share(total, tp_rank, tp_size)))


def blocks_shape(blocks: list[Block], architecture: Architecture) -> tuple[int, ...]:
    """The shape of blocks set one below the other."""
    rows = sum(block.rows[1] - block.rows[0] for block in blocks)
    columns = blocks[0].columns
    rest = hf_tensor_shapes(architecture)[blocks[0].tensor][1:]
    return (rows, *rest) if columns is None else (rows, columns[1] - columns[0])


def is_vocabulary(parameter: str) -> bool:
    """Whether the rows of the parameter are the vocabulary, padded to a size the ranks can share."""
    return parameter in (EMBEDDING, OUTPUT)


def _rule(parameter: str, architecture: Architecture) -> tuple[str, tuple[str, ...]]:
    if parameter == EMBEDDING or (parameter == OUTPUT and architecture.tied_embeddings):
        return "vocabulary", (HF_EMBEDDING,)
    if parameter == OUTPUT:
        return "vocabulary", (HF_OUTPUT,)
    if parameter == FINAL_NORM:
        return "replicated", ("model.norm.weight",)
    layer = _LAYER.fullmatch(parameter)
    if layer is None or int(layer[1]) >= architecture.num_layers or layer[2] not in layer_parameters(architecture):
        raise KeyError(parameter)
    split, tensors = _LAYER_RULES[layer[2]]
    return split, tuple(f"model.layers.{layer[1]}.{tensor}" for tensor in tensors)


def _share(size: int, rank: int, count: int) -> tuple[int, int]:
    if size % count:
        raise ValueError(f"{count} tensor-parallel ranks cannot share {size} rows or columns equally")
    return size // count * rank, size // count * (rank + 1)


def _qkv_by_group(architecture: Architecture, tensors: tuple[str, ...]) -> Iterator[Block]:
    """Megatron-Core's ``linear_qkv``: the queries of a group, its key, its value; then the next group."""
    query, key, value = tensors
    width = architecture.head_dim
    queries = width * (architecture.num_attention_heads // architecture.num_query_groups)
    for group in range(architecture.num_query_groups):
        yield Block(query, (group * queries, (group + 1) * queries))
        yield Block(key, (group * width, (group + 1) * width))
        yield Block(value, (group * width, (group + 1) * width))


def _cut(blocks: Iterator[Block], start: int, stop: int) -> Iterator[Block]:
    """The blocks, or parts of blocks, that make rows ``[start, stop)`` of all of them together.

    With more ranks than query groups a rank's rows begin or end inside a group.
    """
    at = 0
    for block in blocks:
        first, last = block.rows
        begin, end = max(first, first + start - at), min(last, first + stop - at)
        if begin < end:
            yield Block(block.tensor, (begin, end))
        at += last - first
