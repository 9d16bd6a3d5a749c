"""Whole plans: every experiment, the scaling study, files, and the tool itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.planner.plan import plan
from tests.pipeline.tool import run_tool
from tests.planner.conftest import CONF, LARGE, SMALL, composed

OF_THE_PAPER = sorted(path.stem for path in (CONF / "experiment").glob("qwen*.yaml"))
GPUS = {"qwen2.5-72b_to_llama3.1-8b": 64}


@pytest.mark.parametrize(
    ("name", "hardware"),
    [
        # Ten seconds of layouts of 64 GPUs; the study below looks at the same job.
        *(pytest.param(name, "h100", marks=[pytest.mark.slow] if name in GPUS else []) for name in OF_THE_PAPER),
        (OF_THE_PAPER[-1], "h200"),
        (OF_THE_PAPER[-1], "b200"),
    ],
)
def test_every_experiment_fits_where_it_says(name: str, hardware: str) -> None:
    gpus = GPUS.get(name, 8)
    found = plan(composed(f"experiment={name}", f"hardware={hardware}", f"gpus={gpus}"))
    stages = {stage["stage"]: stage for stage in found.values["stages"]}
    assert list(stages) == ["sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "score", "ctpd"]
    for given, best in zip(found.values["stages"], found.values["best"], strict=True):
        assert sum(given["step_shares"].values()) == pytest.approx(1)
        assert 0 < given["model_flops_utilisation"] < 1
        assert best["hours"] <= 1.01 * given["hours"]
    text = found.as_text()
    assert all(stage in text for stage in stages)
    assert "not measurements" in text


def test_warnings_are_printed_and_written() -> None:
    found = plan(composed(SMALL, "gpus=8", "only=[ctpd]", "data.global_batch_size=4"))
    said = (
        "ctpd: a step of 4 pairs (data.global_batch_size) leaves 4 of 8 data-parallel ranks idle; "
        "in this layout at most 4 GPUs have work"
    )
    assert found.values["warnings"] == [said]
    assert f"warning: {said}" in found.as_text().splitlines()
    assert f"- Warning: {said}" in found.as_markdown().splitlines()


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    """The stages of 72B to 8B on 16 and 64 GPUs, by name."""
    found = plan(composed(LARGE, "gpus=[64,16]", "only=[sft_teacher,score,ctpd]"))
    return {stage["stage"]: stage for stage in found.values["scaling"]} | {"text": found.as_text()}


def test_the_study_says_what_does_not_fit_and_what_does(study: dict[str, Any]) -> None:
    # 18 bytes for each of 72.7e9 weights are 81.8 GB on each of 16 GPUs.
    assert study["sft_teacher"]["gpus"]["16"] is None
    assert study["sft_teacher"]["fewest"]["gpus"] == 32
    assert study["score"]["gpus"]["16"]["gpus"] == 16
    assert "does not fit; 32 do" in study["text"]
    assert "does not fit: sft_teacher" in study["text"]


def test_a_small_batch_stops_paying_for_training_but_not_for_scoring(study: dict[str, Any]) -> None:
    assert study["ctpd"]["stops_paying_at"]["gpus"] < 64
    assert "stops paying at" in study["ctpd"]["verdict"]
    assert "16 pairs" in study["ctpd"]["verdict"]
    # Shards are independent of each other: beyond the start, four times the GPUs take a quarter of the time.
    assert study["score"]["stops_paying_at"]["gpus"] == 64
    few, many = (one["steps"] * one["step_seconds"] for one in (study["score"]["gpus"][size] for size in ("16", "64")))
    assert few / many == pytest.approx(4, rel=0.1)


@pytest.mark.slow
def test_a_larger_global_batch_makes_more_gpus_pay(study: dict[str, Any]) -> None:
    larger = plan(composed(LARGE, "gpus=[16,64]", "only=[ctpd]", "data.global_batch_size=128"))
    (stage,) = larger.values["scaling"]

    def gain(of: dict[str, Any]) -> float:
        few, many = (of["gpus"][size]["steps"] * of["gpus"][size]["step_seconds"] for size in ("16", "64"))
        return few / many

    assert gain(stage) > 1.5 * gain(study["ctpd"])


def test_files_hold_what_is_printed(tmp_path: Path) -> None:
    found = plan(composed(SMALL, "gpus=8", "layout=best", "only=[ctpd]", "write=true", f"run_dir={tmp_path}"))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(found.values))
    markdown = (tmp_path / "plan.md").read_text()
    assert markdown == found.as_markdown()
    assert "| ctpd |" in markdown


def test_local_attention_costs_more_memory_and_operations() -> None:
    fused, local = (
        plan(composed(SMALL, "gpus=8", "layout=best", "only=[ctpd]", f"attention={kind}")).values["stages"][0]
        for kind in ("fused", "local")
    )
    assert local["hardware_flops_per_step"] > fused["hardware_flops_per_step"]
    assert local["model_flops_per_step"] == pytest.approx(fused["model_flops_per_step"], rel=0.01)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("gpus=many", "gpus"),
        ("gpus=[]", "gpus"),
        ("gpus=0", "gpus"),
        ("layout=worst", "layout"),
        ("attention=flash", "attention"),
        ("precision=fp8_current attention=local", "attention"),
        ("+hardware.colour=1", "hardware.colour"),
        ("hardware.matmul_fraction=2", "hardware.matmul_fraction"),
        ("hardware.memory_gib=nan", "hardware.memory_gib"),
        ("hardware.bf16_tflops=inf", "hardware.bf16_tflops"),
        ("workload.pairs=0", "workload.pairs"),
        ("workload.spread=nan", "workload.spread"),
        ("workload.mean_prompt_tokens=nan", "workload.mean_prompt_tokens"),
        ("workload.measure=4", "models/Llama-3.2-1B"),
        ("only=[nothing]", "stages"),
        ("model.teacher.path=models/Unknown-1B", "model.teacher.path"),
        ("precision.dtype=int3", "precision.dtype"),
        ("precision.fp8=int4", "precision.fp8"),
    ],
)
def test_bad_input_is_refused_by_name(override: str, place: str) -> None:
    with pytest.raises(InputError) as error:
        plan(composed(SMALL, *override.split()))
    assert error.value.place == place
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_tool_prints_a_plan_and_writes_nothing(tmp_path: Path) -> None:
    status, printed, _ = run_tool("plan.py", [SMALL, "gpus=8", "only=[ctpd]"], tmp_path)
    assert status == 0
    assert "ctpd of Llama-3.2-1B" in printed
    assert not (tmp_path / "runs").exists()
