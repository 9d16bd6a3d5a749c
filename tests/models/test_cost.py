"""The cost of a sequence, against counting."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.data.cost import SequenceCost
from ctpd_nemo.models.cost import layer_matrix_parameters, sequence_cost


@given(st.integers(0, 60), st.none() | st.integers(1, 70))
def test_query_key_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    position = np.arange(length)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (window or length + 1))
    assert SequenceCost(window=window).query_key_pairs([length]).tolist() == [seen.sum()]


def test_cost_is_the_sum_of_its_parts() -> None:
    cost = SequenceCost(attention=0.25, head=0.5)
    assert cost.of([[4, 0], [3, 2]], [[2, 0], [0, 2]]).tolist() == [
        [1024 * (4 + 1 + 10 // 4) + 512, 0],
        [1024 * 3 + 256 * 6, 1024 * 3 + 256 * 3],
    ]


@pytest.fixture(scope="module")
def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def architecture(llama: LlamaConfig, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return read_architecture(folder)


def test_layer_matrices_are_those_of_transformers(llama: LlamaConfig, architecture: Architecture) -> None:
    layer = LlamaForCausalLM(llama).model.layers[0]
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
    assert layer_matrix_parameters(architecture) == matrices


def test_cost_of_a_model_is_in_proportion_to_its_counted_operations(
    llama: LlamaConfig, architecture: Architecture
) -> None:
    """PyTorch counts whole attention, without the causal half; the output layer runs at every token."""
    cost = sequence_cost(architecture)
    model = LlamaForCausalLM(llama).eval()
    per_token = 2 * llama.num_hidden_layers * layer_matrix_parameters(architecture)
    for length in (1, 7, 40):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(torch.zeros(1, length, dtype=torch.long))
        found = counter.get_total_flops() / per_token
        assert found == pytest.approx(length + cost.head * length + cost.attention * length**2, rel=1e-9)


def test_window_is_that_of_the_model(architecture: Architecture) -> None:
    assert sequence_cost(architecture).window is None
    assert sequence_cost(dataclasses.replace(architecture, sliding_window=9)).window == 9


def test_query_key_pairs_are_the_mean_over_layers_with_a_window_and_without() -> None:
    windowed, full = SequenceCost(window=4).query_key_pairs([3, 10, 11]), SequenceCost().query_key_pairs([3, 10, 11])
    mean = SequenceCost(window=4, full_share=1 / 3).query_key_pairs([3, 10, 11])
    assert mean.tolist() == [6, round((2 * windowed[1] + full[1]) / 3), round((2 * windowed[2] + full[2]) / 3)]


def test_share_of_layers_without_a_window_is_that_of_the_model(architecture: Architecture) -> None:
    alternating = dataclasses.replace(architecture, sliding_window=9, full_layers=(1,))
    assert sequence_cost(alternating).full_share == pytest.approx(1 / 3)
