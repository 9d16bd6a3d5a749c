"""The table of rows, against coverage counts; the values themselves are checked in ``test_load``."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.convert.layout import (
    EMBEDDING,
    canonical_name,
    hf_tensor_shapes,
    layer_parameters,
    megatron_parameters,
    shard_blocks,
)


def make_architecture(heads_per_group: int, groups: int, head_dim: int, width: int, tied: bool) -> Architecture:
    return Architecture(
        family="qwen2",
        num_layers=2,
        hidden_size=3 * width,
        ffn_hidden_size=4 * width,
        num_attention_heads=heads_per_group * groups,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=37,
        max_position_embeddings=64,
        norm_eps=1e-6,
        tied_embeddings=tied,
        qkv_bias=True,
        qk_norm=True,
        sliding_window=None,
        rope_theta=10000.0,
        inv_freq=(1.0,),
        dtype=torch.float32,
    )


@given(
    heads_per_group=st.integers(1, 4),
    groups=st.integers(1, 4),
    tp_size=st.integers(1, 4),
    width=st.integers(1, 3),
    tied=st.booleans(),
)
def test_ranks_together_own_every_element_once(
    heads_per_group: int, groups: int, tp_size: int, width: int, tied: bool
) -> None:
    # A head of 12 values, and widths of 12, can be shared by any of these numbers of ranks, groups or not.
    architecture = make_architecture(heads_per_group, groups, 12, 12 * width, tied)
    padded = -(-37 // tp_size) * tp_size
    owners = {tensor: np.zeros(shape, int) for tensor, shape in hf_tensor_shapes(architecture).items()}
    for parameter in megatron_parameters(architecture):
        for rank in range(tp_size):
            for block in shard_blocks(parameter, architecture, rank, tp_size, padded):
                rows, columns = slice(*block.rows), slice(*(block.columns or (None,)))
                owners[block.tensor][(rows, columns) if block.columns else rows] += 1
    for tensor, count in owners.items():
        replicated = "norm" in tensor
        assert (count == (tp_size if replicated else 1)).all(), tensor


def test_more_ranks_than_groups_cut_inside_a_group() -> None:
    architecture = make_architecture(heads_per_group=2, groups=1, head_dim=4, width=4, tied=False)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    # All rows, in Megatron's order: 8 of the queries, 4 of the key, 4 of the value.
    cut = [
        [(block.tensor.split(".")[4], block.rows) for block in shard_blocks(name, architecture, rank, 8)]
        for rank in (0, 4, 6)
    ]
    assert cut == [[("q_proj", (0, 2))], [("k_proj", (0, 2))], [("v_proj", (0, 2))]]


def test_a_rank_beyond_the_vocabulary_owns_padding_only() -> None:
    architecture = make_architecture(1, 1, 4, 4, tied=True)
    assert [b.rows for b in shard_blocks(EMBEDDING, architecture, 0, 2, 96)] == [(0, 37)]
    assert shard_blocks(EMBEDDING, architecture, 1, 2, 96) == []


def test_fused_and_local_layers_have_one_name() -> None:
    transformer_engine = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
    local = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
    names = [f"decoder.layers.7.{parameter}" for parameter in transformer_engine]
    assert [canonical_name(f"decoder.layers.3.{parameter}", 4) for parameter in local] == names
    assert [canonical_name(f"decoder.layers.3.{parameter}", 4) for parameter in transformer_engine] == names
    assert canonical_name("decoder.final_layernorm.weight", 4) == "decoder.final_layernorm.weight"


def test_every_parameter_is_named_once() -> None:
    architecture = make_architecture(2, 2, 4, 4, tied=False)
    names = Counter(megatron_parameters(architecture))
    assert set(names.values()) == {1}
    assert len(names) == 3 + 2 * len(layer_parameters(architecture))


def test_a_parameter_of_another_model_is_an_error() -> None:
    architecture = make_architecture(1, 1, 4, 4, tied=True)
    for name in ("decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.bias", "lm_head.weight"):
        with pytest.raises(KeyError):
            shard_blocks(name, architecture)


def test_unequal_shares_are_an_error() -> None:
    architecture = make_architecture(1, 1, 4, 4, tied=True)
    with pytest.raises(ValueError, match="5 tensor-parallel ranks cannot share 12"):
        shard_blocks("decoder.layers.0.self_attention.linear_qkv.weight", architecture, 0, 5)
