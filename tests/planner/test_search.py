"""Layouts that are found, and layouts that are refused."""

from dataclasses import replace

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.planner.estimate import check_layout, estimate, fits, memory
from ctpd_nemo.planner.hardware import GIB, Hardware
from ctpd_nemo.planner.jobs import Job, Layout
from ctpd_nemo.planner.report import idle_ranks
from ctpd_nemo.planner.search import best_layout, fewest_gpus, fitting_layouts, given_layout
from ctpd_nemo.planner.workload import Lengths
from tests.planner.conftest import LARGE, SMALL, jobs_of

Jobs = dict[str, Job]


@pytest.fixture(scope="module")
def small() -> Jobs:
    return jobs_of(SMALL)


@pytest.mark.parametrize("stage", ["sft_teacher", "dpo_positive", "score", "ctpd"])
def test_the_best_layout_divides_fits_and_beats_the_rest(
    small: Jobs, stage: str, h100: Hardware, lengths: Lengths
) -> None:
    best = best_layout(small[stage], 8, h100, lengths)
    assert best is not None
    check_layout(small[stage], best.layout)
    assert fits(memory(small[stage], best.layout), h100)
    hours = [estimate(small[stage], layout, h100, lengths).hours for layout in fitting_layouts(small[stage], 8, h100)]
    assert len(hours) > 20
    # Among equals, to a thousandth, the simpler one is taken.
    assert best.hours <= 1.01 * min(hours)


def test_recomputation_comes_only_where_nothing_else_fits(small: Jobs, h100: Hardware) -> None:
    for layout in fitting_layouts(small["dpo_positive"], 8, h100):
        less = {"none": None, "selective": "none", "full": "selective"}[layout.parallel.recompute]
        if less is not None:
            tighter = replace(layout, parallel=replace(layout.parallel, recompute=less))
            assert not fits(memory(small["dpo_positive"], tighter), h100)


def test_a_layout_that_does_not_fit_is_refused_with_one_that_does(lengths: Lengths, h100: Hardware) -> None:
    job = jobs_of(LARGE, "stages.sft_teacher.parallel={tensor: 8, pipeline: 2, sequence: true}")["sft_teacher"]
    with pytest.raises(InputError) as error:
        given_layout(job, 16, h100, lengths)
    assert "\n" not in str(error.value)
    assert error.value.place == "stage sft_teacher, parallel"
    assert "tensor 8, pipeline 2" in error.value.found
    # 18 bytes for each of 72.7e9 weights are over what 16 GPUs have.
    assert h100.usable_bytes < 18 * 72.7e9 / 16
    assert "what fits: 32 GPUs, tensor" in error.value.expected


def test_what_a_refusal_names_is_accepted(small: Jobs, lengths: Lengths, h100: Hardware) -> None:
    tight = replace(h100, memory_gib=24.0)
    job = small["sft_teacher"]
    with pytest.raises(InputError, match="what fits: 8 GPUs"):
        given_layout(job, 8, tight, lengths)
    best = best_layout(job, 8, tight, lengths)
    assert best is not None
    as_given = replace(job, parallel=best.layout.parallel, microbatch_tokens=best.layout.microbatch_tokens)
    assert given_layout(as_given, 8, tight, lengths).peak_bytes <= tight.usable_bytes


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("stages.sft_teacher.parallel={tensor: 3}", "parallel.tensor"),
        ("stages.sft_teacher.parallel={tensor: 1, sequence: true}", "parallel.sequence"),
        ("++stages.sft_teacher.parallel={tensor: 1, pipeline: 8, sequence: false}", "parallel.pipeline"),
        ("stages.sft_teacher.parallel={tensor: 16}", "parallel"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_the_rules_of_training(
    override: str, place: str, lengths: Lengths, h100: Hardware
) -> None:
    job = jobs_of(SMALL, override)["sft_teacher"]
    with pytest.raises(InputError) as error:
        given_layout(job, 24 if "3" in override else 8, h100, lengths)
    assert error.value.place == f"stage sft_teacher, {place}"
    assert "what fits" in error.value.expected


def test_the_fewest_gpus_are_fewer_for_a_smaller_model(small: Jobs, lengths: Lengths, h100: Hardware) -> None:
    teacher, student = (fewest_gpus(small[stage], 0, h100, lengths) for stage in ("sft_teacher", "sft_student"))
    assert teacher is not None
    assert student is not None
    # 18 bytes a weight: 1.24e9 of them fit on one GPU, 7.6e9 do not.
    assert student.layout.gpus == 1
    assert teacher.layout.gpus == 2
    assert best_layout(small["sft_teacher"], 1, h100, lengths) is None


def test_a_frozen_reference_takes_its_weights(small: Jobs, h100: Hardware) -> None:
    dpo, sft = small["dpo_positive"], small["sft_teacher"]
    layout = Layout(8, dpo.parallel, dpo.microbatch_tokens)
    beside, alone = memory(dpo, layout)[0], memory(sft, layout)[0]
    assert beside.weights == alone.weights
    weights = dpo.models[0].parameters * 2 / layout.parallel.tensor
    assert beside.frozen == pytest.approx(weights, rel=1e-3)
    # Scoring holds the three roles at once.
    assert memory(small["score"], layout)[0].frozen == pytest.approx(3 * weights, rel=1e-3)


def test_scoring_holds_as_many_models_as_fit_and_then_the_most_tokens(lengths: Lengths, h100: Hardware) -> None:
    four = "stages.score.parallel={tensor: 4, sequence: true}"
    apart = given_layout(jobs_of(LARGE, four)["score"], 4, h100, lengths)
    # 145 GB of bf16 weights a model: on 4 GPUs one of them takes less than three quarters of the memory, two more.
    assert apart.layout.held == 1
    assert apart.layout.microbatch_tokens > 4096
    assert 145e9 / 4 < 0.75 * h100.memory_gib * GIB < 2 * 145e9 / 4
    assert given_layout(jobs_of(LARGE)["score"], 8, h100, lengths).layout.held is None
    all_at_once = jobs_of(LARGE, four, "++stages.score.method={name: score, together: true}")["score"]
    with pytest.raises(InputError, match=r"what fits: 8 GPUs"):
        given_layout(all_at_once, 4, h100, lengths)
    of_its_own = jobs_of(LARGE, "++stages.score.method={name: score, microbatch_tokens: 8192}")["score"]
    assert given_layout(of_its_own, 8, h100, lengths).layout.microbatch_tokens == 8192


def test_a_job_starts_by_reading_every_model_once(small: Jobs, lengths: Lengths, h100: Hardware) -> None:
    score = small["score"]
    found = estimate(score, Layout(8, score.parallel, score.microbatch_tokens), h100, lengths)
    # Each of four replicas on the node reads three models of 7.6e9 bf16 weights.
    read = 4 * 3 * 2 * score.models[0].parameters / (h100.read_gb_per_s * 1e9)
    assert score.parallel.tensor == 2
    assert found.start_seconds == pytest.approx(h100.start_s + read)
    assert found.hours == pytest.approx((found.start_seconds + found.steps * found.step_seconds) / 3600)


def test_online_teachers_stand_beside_the_student_and_the_cache_spares_them(h100: Hardware, lengths: Lengths) -> None:
    online = "++stages.ctpd.method={name: ctpd, reference: online, positive: a, negative: b}"
    cached, beside = jobs_of(SMALL)["ctpd"], jobs_of(SMALL, online)["ctpd"]
    layout = Layout(8, replace(cached.parallel, tensor=4, sequence=True), 8192)
    less, more = (estimate(job, layout, h100, lengths) for job in (cached, beside))
    assert more.peak_bytes - less.peak_bytes > 3 * 7.6e9 * 2 / 4
    # Three forward passes of 7.6e9 weights on top of 6 operations for each of 1.24e9.
    assert more.model_flops / less.model_flops == pytest.approx(1 + 3 * 2 * 7.1 / (6 * 1.24), rel=0.1)
    assert more.step_seconds > less.step_seconds


def test_more_memory_never_makes_the_best_slower(small: Jobs, lengths: Lengths, h100: Hardware) -> None:
    times = []
    for memory_gib in (30.0, 80.0, 160.0):
        best = best_layout(small["dpo_positive"], 4, replace(h100, memory_gib=memory_gib), lengths)
        times.append(float("inf") if best is None else best.step_seconds)
    assert times[0] >= 0.99 * times[1] >= 0.98 * times[2]
    assert h100.usable_bytes < 80 * GIB


def test_the_student_on_64_gpus_leaves_ranks_idle_and_the_plan_says_so(h100: Hardware, lengths: Lengths) -> None:
    large = jobs_of(LARGE)
    assert idle_ranks(given_layout(large["ctpd"], 64, h100, lengths)) == (
        "ctpd: a step of 16 pairs (data.global_batch_size) leaves 16 of 32 data-parallel ranks idle; "
        "in this layout at most 32 GPUs have work"
    )
    for stage, gpus in (("ctpd", 32), ("sft_teacher", 64), ("score", 64)):
        assert idle_ranks(given_layout(large[stage], gpus, h100, lengths)) is None


@pytest.mark.parametrize(("stage", "each"), [("sft_teacher", 6), ("dpo_positive", 8)])
def test_operations_of_an_experiment_are_six_for_a_weight_and_token_and_two_more_for_a_reference(
    stage: str, each: int, h100: Hardware, lengths: Lengths
) -> None:
    """Of all weights but the embedding; the output layer is made at response tokens alone, attention comes on top."""
    found = given_layout(jobs_of(LARGE)[stage], 64, h100, lengths)
    closed = each * (72.7e9 - 152064 * 8192) * found.step_tokens
    assert 0.97 * closed < found.model_flops < 1.05 * closed


@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_current", "fp8_blockwise", "mxfp8"])
def test_every_recipe_has_a_plan_that_takes_more_memory_for_weights_and_less_time(
    recipe: str, h100: Hardware, lengths: Lengths
) -> None:
    bf16, fp8 = (
        given_layout(jobs_of(SMALL, f"precision={name}")["sft_teacher"], 8, h100, lengths) for name in ("bf16", recipe)
    )
    assert fp8.stages[0].weights > bf16.stages[0].weights
    assert fp8.step_seconds < bf16.step_seconds


def test_overlapped_tensor_parallelism_has_layouts(h100: Hardware) -> None:
    job = jobs_of(SMALL)["sft_teacher"]
    check_layout(job, Layout(8, replace(job.parallel, overlap_tensor=True), job.microbatch_tokens))
    job = replace(job, parallel=replace(job.parallel, overlap_tensor=True))
    assert any(layout.parallel.overlap_tensor for layout in fitting_layouts(job, 8, h100))
