"""Operations, schedules and memory against closed forms and brute force."""

import itertools

import pytest

from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.planner.architecture import find_architecture
from ctpd_nemo.planner.flops import hardware_flops, model_flops
from ctpd_nemo.planner.memory import Frozen, Request, frozen_memory, job_memory, trained_memory
from ctpd_nemo.planner.numerics import numerics_of
from ctpd_nemo.planner.parameters import buffer_numel, stage_parameters
from ctpd_nemo.planner.schedule import in_flight
from ctpd_nemo.planner.shapes import attended_pairs, fullest_shape, shape_of

LLAMA = find_architecture("Llama-3.1-8B", "model.student").architecture
QWEN = find_architecture("Qwen2.5-72B", "model.teacher").architecture


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attended_pairs_are_those_of_the_causal_mask(window: int | None) -> None:
    lengths = [1, 4, 9]
    seen = sum(
        key <= query and (window is None or query - key < window)
        for length in lengths
        for query, key in itertools.product(range(length), repeat=2)
    )
    assert attended_pairs(lengths, window) == seen


def test_local_attention_scores_every_padded_pair() -> None:
    shape = shape_of([3, 5], targets=4, attention="local", multiple=4)
    # The padding up to a multiple of 4 belongs to the last sequence.
    assert (shape.tokens, shape.longest, shape.sequences) == (8, 5, 2)
    assert shape.scored == 2 * 5 * 5
    assert shape_of([3, 5], targets=4, multiple=3).tokens == 9


def test_pairs_of_alternating_windows_are_those_of_both_kinds_of_layers() -> None:
    assert shape_of([9], targets=1, window=2, full_share=0.5).attended == round((17 + 45) / 2)


def test_model_operations_are_six_a_weight_and_token() -> None:
    shape = fullest_shape(4096, longest=2048)
    matrices = LLAMA.num_layers * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    scores = 2 * 2048 * 2049 / 2
    expected = 6 * matrices * 4096 + 12 * LLAMA.num_layers * 4096 * scores
    assert model_flops(LLAMA, shape).total == pytest.approx(expected, rel=1e-12)
    assert model_flops(LLAMA, shape, backward=False).total == pytest.approx(expected / 3, rel=1e-12)


def test_recomputation_adds_one_forward_pass_of_what_it_makes_again() -> None:
    shape = fullest_shape(4096, longest=2048)
    forward = model_flops(LLAMA, shape, backward=False)
    none, selective, full = (
        hardware_flops(LLAMA, ParallelConfig(recompute=mode), shape).total for mode in ("none", "selective", "full")
    )
    assert selective - none == pytest.approx(forward.attention)
    assert full - none == pytest.approx(forward.attention + forward.layers)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_one_forward_one_backward_holds_as_many_microbatches_as_stages_behind_it(stages: int) -> None:
    parallel = ParallelConfig(pipeline=stages)
    assert [in_flight(parallel, stage, 100) for stage in range(stages)] == [[stages - i] for i in range(stages)]
    assert in_flight(parallel, 0, 1) == [1]


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 5), (8, 2)])
def test_interleaving_holds_more_by_the_known_factor(stages: int, chunks: int) -> None:
    """``1 + (p - 1) / (p v)`` of one forward, one backward on the first stage (Korthikanti et al. 2022)."""
    parallel = ParallelConfig(pipeline=stages, virtual_pipeline=chunks)
    held = sum(in_flight(parallel, 0, 100)) / chunks
    assert held == pytest.approx(stages * (1 + (stages - 1) / (stages * chunks)))


@pytest.mark.parametrize(("replicas", "sharded", "bytes_each"), [(1, False, 18), (1, True, 18), (8, True, 6 + 12 / 8)])
def test_mixed_precision_takes_the_known_bytes_a_parameter(replicas: int, sharded: bool, bytes_each: float) -> None:
    """bf16 weights, fp32 gradients: 18 bytes, or 6 + 12 / d with the distributed optimizer (Megatron-Core's docs)."""
    parallel = ParallelConfig(tensor=8, pipeline=4, sequence=True, distributed_optimizer=sharded)
    chunks = stage_parameters(QWEN, parallel, stage=1)
    memory = trained_memory(chunks, parallel, numerics_of(PrecisionConfig("bf16"), QWEN), replicas)
    total = memory.weights + memory.gradients + memory.optimizer
    assert total == pytest.approx(bytes_each * sum(p.numel for chunk in chunks for p in chunk), rel=1e-4)


def test_buffers_pad_parameters_to_64_and_buckets_to_what_ranks_can_share() -> None:
    parallel = ParallelConfig(tensor=8)
    (chunk,) = stage_parameters(QWEN, parallel, stage=0)
    exact = sum(parameter.numel for parameter in chunk)
    assert buffer_numel(chunk, replicas=3, distributed_optimizer=False) == exact
    padded = buffer_numel(chunk, replicas=3, distributed_optimizer=True)
    assert padded % (3 * 128) == 0
    assert exact <= padded < exact + 64 * len(chunk) + 3 * 128


@pytest.mark.parametrize("attention", ["local", "fused"])
@pytest.mark.parametrize("precision", [PrecisionConfig("fp32"), PrecisionConfig(), PrecisionConfig(fp8="mxfp8")])
def test_more_recomputation_keeps_less(attention: str, precision: PrecisionConfig) -> None:
    shape = fullest_shape(8192, longest=2048)
    request = Request(LLAMA, shape, microbatches=4, step_tokens=4 * 8192, attention=attention)
    numerics = numerics_of(precision, LLAMA)
    kept = [
        job_memory(request, ParallelConfig(recompute=mode), numerics, 1)[0].activations
        for mode in ("none", "selective", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 4 * kept[2]


def test_fp8_keeps_less_than_bf16_and_sequence_parallelism_less_than_none() -> None:
    shape = fullest_shape(8192, longest=2048)
    request = Request(LLAMA, shape, microbatches=1, step_tokens=8192)

    def kept(precision: PrecisionConfig, **parallel: object) -> float:
        layout = ParallelConfig(**parallel)  # type: ignore[arg-type]
        return job_memory(request, layout, numerics_of(precision, LLAMA), 1)[0].activations

    bf16, fp8 = PrecisionConfig(), PrecisionConfig(fp8="current")
    some = PrecisionConfig(fp8="current", bf16_first_layers=8, bf16_last_layers=8)
    assert kept(fp8) < kept(some) < kept(bf16)
    assert kept(bf16, tensor=4, sequence=True) < kept(bf16, tensor=4) < kept(bf16)
    assert kept(bf16, context=2) == pytest.approx(kept(bf16) / 2, rel=1e-3)


def test_frozen_fp8_weights_take_half_of_bf16() -> None:
    shape = fullest_shape(4096, longest=2048)

    def weights(precision: PrecisionConfig) -> float:
        frozen = Frozen(QWEN, 1, shape, numerics_of(precision, QWEN, frozen=True))
        return frozen_memory(frozen, ParallelConfig(tensor=8, pipeline=4), stage=1)

    bf16, only_fp8 = PrecisionConfig(), PrecisionConfig(fp8="current", fp8_frozen_weights=True)
    assert weights(only_fp8) / weights(bf16) == pytest.approx(0.5, rel=1e-3)
    # Without giving up bf16, Transformer Engine keeps both.
    assert weights(PrecisionConfig(fp8="current")) / weights(bf16) == pytest.approx(1.5, rel=1e-3)
