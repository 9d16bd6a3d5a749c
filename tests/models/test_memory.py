"""What is held at once fits, and what a device can hold is used."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.layout import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    blocks_shape,
    layer_name,
    layer_parameters,
    shard_blocks,
)
from ctpd_nemo.data.loader import Batching
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.cost import stage_parameters
from ctpd_nemo.models.gpt import PrecisionConfig, padded_vocab_size
from ctpd_nemo.models.memory import full_microbatch, largest_microbatch, model_passes, most_indexed_tokens
from ctpd_nemo.models.teacher import weight_bytes
from ctpd_nemo.parallel.layout import ParallelConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "bias": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "norms of heads": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
}


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest, tmp_path: Path) -> Architecture:
    CONFIGS[request.param].save_pretrained(tmp_path)
    return read_architecture(tmp_path)


def loaded(architecture: Architecture, tensor: int, pipeline: int, stage: int) -> int:
    """Elements that loading fills on a rank of a stage, padding of the vocabulary included."""
    layers = architecture.num_layers // pipeline
    names = [layer_name(stage * layers + n, name) for n in range(layers) for name in layer_parameters(architecture)]
    total = 0
    for name in [*names, *([FINAL_NORM] if stage == pipeline - 1 else [])]:
        shape = blocks_shape(shard_blocks(name, architecture, 0, tensor), architecture)
        total += torch.Size(shape).numel()
    vocabularies = {EMBEDDING} if stage == 0 else set()
    if stage == pipeline - 1 and not (pipeline == 1 and architecture.tied_embeddings):
        vocabularies.add(OUTPUT)
    padded = padded_vocab_size(architecture.vocab_size, tensor) // tensor
    return total + len(vocabularies) * padded * architecture.hidden_size


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_weights_of_a_rank_are_those_that_loading_fills(tensor: int, pipeline: int, architecture: Architecture) -> None:
    stages = [loaded(architecture, tensor, pipeline, stage) for stage in range(pipeline)]
    for stage, elements in enumerate(stages):
        ends = stage == 0, stage == pipeline - 1
        assert stage_parameters(architecture, tensor, pipeline, *ends) == elements
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    assert weight_bytes(architecture, layout, PrecisionConfig("fp32")) == 4 * max(stages)
    assert weight_bytes(architecture, layout, PrecisionConfig("bf16")) == 2 * max(stages)


@pytest.mark.parametrize(
    ("precision", "first", "last"),
    [
        (PrecisionConfig(fp8="current"), 3, 3),
        (PrecisionConfig(fp8="current", fp8_frozen_weights=True), 1, 1),
        (PrecisionConfig(fp8="mxfp8", fp8_frozen_weights=True), 1 + 1 / 32, 1 + 1 / 32),
        # One layer of two on the first stage stays in bf16, both of the last.
        (PrecisionConfig(fp8="current", fp8_frozen_weights=True, bf16_first_layers=1, bf16_last_layers=2), 1.5, 2),
    ],
    ids=lambda value: value.name if isinstance(value, PrecisionConfig) else "",
)
def test_weights_in_fp8_count_as_what_they_take(
    precision: PrecisionConfig, first: float, last: float, architecture: Architecture
) -> None:
    matrices = [name for name in layer_parameters(architecture) if "norm" not in name and not name.endswith("bias")]
    shapes = [blocks_shape(shard_blocks(layer_name(0, name), architecture, 0, 2), architecture) for name in matrices]
    of_stage = 2 * sum(torch.Size(shape).numel() for shape in shapes)
    stages = [
        2 * (loaded(architecture, 2, 2, stage) - of_stage) + bytes_of_weight * of_stage
        for stage, bytes_of_weight in enumerate((first, last))
    ]
    found = weight_bytes(architecture, ParallelConfig(tensor=2, pipeline=2), precision)
    assert found == pytest.approx(max(stages), abs=1)


def test_models_are_held_together_as_far_as_three_quarters_of_memory_go() -> None:
    assert model_passes([10, 10, 10], free=40, together=None) == [[0, 1, 2]]
    assert model_passes([10, 10, 10], free=39, together=None) == [[0, 1], [2]]
    assert model_passes([10, 10, 10], free=14, together=None) == [[0], [1], [2]]
    assert model_passes([10, 10, 10], free=5, together=None) == [[0], [1], [2]], "an estimate refuses nothing"
    assert model_passes([10, 10, 10], free=5, together=True) == [[0, 1, 2]]
    assert model_passes([10, 10, 10], free=1000, together=False) == [[0], [1], [2]]


def alone(value: int) -> int:
    return value


@given(
    st.integers(1, 50), st.integers(0, 10_000), st.integers(1, 20), st.integers(0, 200_000), st.integers(10**5, 10**7)
)
def test_the_largest_forward_pass_fits_and_twice_as_much_might_not(
    per_token: int, constant: int, factor: int, most: int, free: int
) -> None:
    start = 64 * factor
    tried: list[int] = []

    def peak_of(tokens: int) -> int:
        tried.append(tokens)
        peak = constant + per_token * tokens
        return peak if peak <= free else 0

    if constant + per_token * start > free:
        with pytest.raises(InputError, match=f"found no memory for {start} beside the weights"):
            largest_microbatch(peak_of, start, most, free, alone)
        return
    tokens = largest_microbatch(peak_of, start, most, free, alone)
    assert tokens in [start * 2**n for n in range(20)]
    assert tokens <= max(start, most)
    # Nothing was tried that could not fit, and the next is above the limit or may be above 4/5 of what is free.
    assert all(constant + per_token * tokens <= free for tokens in tried)
    assert 2 * tokens > most or 2 * (constant + per_token * tokens) > 0.8 * free


def test_a_pass_that_takes_more_than_foreseen_is_gone_back_from() -> None:
    def peak_of(tokens: int) -> int:
        return tokens if tokens <= 4000 else 0

    assert largest_microbatch(peak_of, 1000, 10**6, 10**6, alone) == 4000


def test_all_ranks_stop_where_the_first_does() -> None:
    """The other rank agrees to 1000 and 2000 tokens, and has no memory to try 4000."""
    others = iter([1, 1, 1, 0])
    tried: list[int] = []

    def peak_of(tokens: int) -> int:
        tried.append(tokens)
        return tokens

    assert largest_microbatch(peak_of, 1000, 10**6, 10**6, lambda value: min(value, next(others))) == 2000
    assert tried == [1000, 2000]


@pytest.mark.parametrize("batching", [Batching(0), Batching(0, pad_to_multiple=16, sequence_multiple=4)])
def test_a_full_microbatch_fills_the_budget_with_longest_sequences_all_of_them_response(batching: Batching) -> None:
    full = full_microbatch(1024, 100, batching)
    assert full.num_tokens <= 1024 < full.num_tokens + 200
    assert full.num_tokens % batching.whole_multiple == 0
    assert 100 <= full.max_seqlen < 100 + batching.whole_multiple
    assert (full.labels >= 0).sum() == 99 * full.num_responses
    assert full.num_spans == 99 * full.num_responses


def test_activations_stay_within_what_32_bits_index(architecture: Architecture) -> None:
    tokens = most_indexed_tokens(architecture, ParallelConfig(tensor=2))
    assert tokens * 2 * architecture.ffn_hidden_size // 2 < 2**31 <= (tokens + 1) * architecture.ffn_hidden_size
    wide = dataclasses.replace(architecture, ffn_hidden_size=28672)
    assert most_indexed_tokens(wide, ParallelConfig()) == (2**31 - 1) // (2 * 28672)
