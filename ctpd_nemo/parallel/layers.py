"""Which transformer layer a model is made of: Transformer Engine's where it is installed, local ones elsewhere."""

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ctpd_nemo.parallel.attention import PackedAttention
from ctpd_nemo.parallel.norm import RMSNorm


def transformer_engine_available() -> bool:
    """Whether Transformer Engine is installed and there is a GPU to run it on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def weight_gradients_can_accumulate() -> bool:
    """Whether apex's kernel is there that adds a weight's gradient to the fp32 gradient buffer as it computes it."""
    return transformer_engine_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def layer_spec(qk_norm: bool, use_transformer_engine: bool) -> ModuleSpec:
    """The spec of one dense decoder layer.

    Args:
        qk_norm: Normalise queries and keys a head (Qwen3).
        use_transformer_engine: Transformer Engine's fused layers, or Megatron-Core's own with packed attention.
    """
    if use_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return spec


def block_spec(
    layer: ModuleSpec, num_layers: int, use_transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of one pipeline stage: ``num_layers`` equal layers and the norm that ends the last stage.

    Megatron-Core wraps a lone layer spec by itself, with a final norm that refuses sequence parallelism where
    Transformer Engine and apex are absent; the local block therefore names its final norm.
    """
    if use_transformer_engine:
        return layer
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
