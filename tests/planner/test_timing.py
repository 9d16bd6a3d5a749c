"""Estimated times against closed forms, on a machine that reaches everything."""

from dataclasses import replace

import numpy as np
import pytest

from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.planner.architecture import find_architecture
from ctpd_nemo.planner.batches import Load
from ctpd_nemo.planner.flops import hardware_flops
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.numerics import numerics_of
from ctpd_nemo.planner.parameters import buffer_numel, stage_parameters
from ctpd_nemo.planner.shapes import fullest_shape
from ctpd_nemo.planner.timing import Parts, pass_parts, update_parts

LLAMA = find_architecture("Llama-3.1-8B", "model.student").architecture
# No head to speak of, so that all stages of a pipeline are alike.
HEADLESS = replace(LLAMA, vocab_size=8)
BF16 = numerics_of(PrecisionConfig(), LLAMA)


def load(microbatches: int, ranks: int = 1, tokens: int = 4096) -> Load:
    """One step of equal microbatches on every rank, of sequences of one length."""
    shape = fullest_shape(tokens, longest=2048)
    values = (shape.tokens, shape.targets, shape.attended, shape.scored, shape.tokens)
    return Load(*(np.full((1, ranks, microbatches), float(value)) for value in values))


def passes(hardware: Hardware, work: Load, data_ranks: int = 1, backward: bool = True, **parallel: object) -> Parts:
    layout = ParallelConfig(**parallel)  # type: ignore[arg-type]
    return pass_parts(LLAMA if backward is None else HEADLESS, layout, BF16, hardware, work, data_ranks, backward)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_products_take_their_operations_at_the_rate_of_the_machine(ideal: Hardware, recompute: str) -> None:
    parallel = ParallelConfig(recompute=recompute)
    parts = pass_parts(LLAMA, parallel, BF16, ideal, load(3), 1, backward=True)
    expected = 3 * hardware_flops(LLAMA, parallel, fullest_shape(4096, 2048)).total / 1e12
    assert parts.compute + parts.recompute == pytest.approx(expected, rel=1e-9)


def test_tensor_and_pipeline_ranks_share_the_operations(ideal: Hardware) -> None:
    alone = pass_parts(LLAMA, ParallelConfig(), BF16, ideal, load(4), 1, backward=True)
    shared = pass_parts(LLAMA, ParallelConfig(tensor=2, pipeline=4), BF16, ideal, load(4), 1, backward=True)
    assert shared.compute == pytest.approx(alone.compute / 8, rel=1e-9)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 4), (8, 32)])
def test_the_bubble_is_the_known_share(ideal: Hardware, stages: int, microbatches: int) -> None:
    """Narayanan et al. 2021, section 2.2: ``(p - 1) / m`` of the work, and ``1 / v`` of that when interleaved."""
    parts = passes(ideal, load(microbatches), pipeline=stages)
    work = parts.compute + parts.recompute + parts.elementwise
    assert parts.bubble / work == pytest.approx((stages - 1) / microbatches, rel=0.01)
    interleaved = passes(ideal, load(microbatches), pipeline=stages, virtual_pipeline=2)
    assert interleaved.bubble / work == pytest.approx((stages - 1) / microbatches / 2, rel=0.01)


def test_interleaving_cannot_hurry_a_single_microbatch(ideal: Hardware) -> None:
    """It goes through all layers one after the other, however they are dealt out, and is filled up to a whole group."""
    plain = passes(ideal, load(1), pipeline=4)
    interleaved = passes(ideal, load(1), pipeline=4, virtual_pipeline=4)
    assert interleaved.total - interleaved.transfer >= plain.total - plain.transfer


def test_fp8_doubles_the_rate_of_layers_alone(ideal: Hardware) -> None:
    fast = replace(ideal, fp8_tflops=2.0)
    some = PrecisionConfig(fp8="current", bf16_first_layers=8)
    bf16, fp8, mixed = (
        pass_parts(HEADLESS, ParallelConfig(), numerics_of(precision, LLAMA), fast, load(1), 1, backward=True).compute
        for precision in (PrecisionConfig(), PrecisionConfig(fp8="current"), some)
    )
    attention = 3.5 * 4 * 32 * 4096 * fullest_shape(4096, 2048).scored / 1e12
    assert bf16 - attention == pytest.approx(2 * (fp8 - attention), rel=1e-3)
    # A quarter of the layers at half the rate.
    assert mixed - attention == pytest.approx(1.25 * (fp8 - attention), rel=1e-3)


def test_ranks_without_pairs_wait(ideal: Hardware) -> None:
    busy, half = passes(ideal, load(2, ranks=4), data_ranks=4), passes(ideal, load(2, ranks=4), data_ranks=8)
    assert busy.waiting == pytest.approx(0, abs=1e-9)
    assert half.total == pytest.approx(busy.total)
    assert half.shares()["waiting"] == pytest.approx(0.5)


def test_parts_add_up_to_the_slowest_rank(ideal: Hardware) -> None:
    work = load(3, ranks=2)
    work.tokens[0, 1, 1:] = work.targets[0, 1, 1:] = work.attended[0, 1, 1:] = work.scored[0, 1, 1:] = 0
    uneven, full = passes(ideal, work, data_ranks=2), passes(ideal, load(3), data_ranks=1)
    assert uneven.total == pytest.approx(full.total, rel=1e-9)
    assert uneven.waiting > 0.3 * uneven.total


def test_sums_over_tensor_ranks_take_a_ring_over_nvlink(ideal: Hardware) -> None:
    parts = passes(ideal, load(1), backward=False, tensor=4, sequence=True)
    # Two all-reduces a layer, as a reduce-scatter and an all-gather each.
    wire = 2 * 32 * 2 * 3 / 4 * 4096 * 4096 * 2
    assert parts.tensor == pytest.approx(wire / 1e12, rel=1e-9)


def test_updates_cross_the_network_where_a_node_does_not_hold_all_replicas(ideal: Hardware) -> None:
    parallel = ParallelConfig(tensor=8)
    numel = sum(buffer_numel(chunk, 4, True) for chunk in stage_parameters(LLAMA, parallel, 0))
    parts = update_parts(LLAMA, parallel, BF16, ideal, 4, Parts(), 1)
    # fp32 gradients one way, bf16 weights back, one network card for each of eight tensor ranks.
    assert parts.data == pytest.approx((4 + 2) * 3 / 4 * numel / 100e9, rel=1e-9)
    within = update_parts(LLAMA, ParallelConfig(tensor=2), BF16, ideal, 4, Parts(), 1)
    numel = sum(buffer_numel(chunk, 4, True) for chunk in stage_parameters(LLAMA, ParallelConfig(tensor=2), 0))
    assert within.data == pytest.approx((4 + 2) * 3 / 4 * numel / 1e12, rel=1e-9)


def test_overlap_hides_updates_behind_passes(ideal: Hardware) -> None:
    shown = update_parts(LLAMA, ParallelConfig(), BF16, ideal, 8, Parts(compute=10.0), 1)
    overlap = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    assert shown.data > 0
    assert update_parts(LLAMA, overlap, BF16, ideal, 8, Parts(compute=10.0), 1).data == pytest.approx(0, abs=1e-9)
