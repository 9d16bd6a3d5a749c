"""The recipe with other weightings, references and TIS-DPO: which stages it needs, and what they leave."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.score_cache import read_manifest
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline, stage_config
from ctpd_nemo.planner.jobs import find_jobs
from tests.pipeline.recipe import composed, recipe, small_world
from tests.rounding import of_model

NO_TEACHER_PAIR = ["stages.dpo_positive=null", "stages.dpo_negative=null"]
STUDENT_PAIR = [
    "stages.dpo_student_positive={method:{name:dpo,beta:0.3},optim:{lr:5e-4}}",
    "stages.dpo_student_negative={method:{name:dpo,beta:0.3,reverse:true},optim:{lr:5e-4}}",
]
SCORE_STUDENT = ["stages.score_student={method:{name:score}}"]
MARGIN = ["stages.score.method.margin=true"]
TIS_DPO = ["stages.tis_dpo={method:{name:tis_dpo,beta:0.1},optim:{lr:5e-4}}"]

# By weights or reference, the least that a pipeline must be asked for.
LEAST = {
    "weights=contrastive_teacher": [],
    "weights=average": [],
    "weights=constant": [],
    "weights=shuffled": [],
    "weights=contrastive_student": [*NO_TEACHER_PAIR, *STUDENT_PAIR, *SCORE_STUDENT],
    "weights=teacher_student": [*NO_TEACHER_PAIR, *SCORE_STUDENT],
    "weights=single_teacher": [*NO_TEACHER_PAIR, *MARGIN],
    "weights=random": NO_TEACHER_PAIR,
    "weights=uniform": NO_TEACHER_PAIR,
    "reference_model=student": SCORE_STUDENT,
}


def ctpd(*overrides: str) -> dict[str, str]:
    """What the stage is given of other stages, by key."""
    config = composed("pipeline", ["run_dir=run", *overrides])
    done = {stage.name: StageResult(Path(stage.name), 0.0, skipped=True) for stage in STAGES}
    run = stage_config(config, next(stage for stage in STAGES if stage.name == "ctpd"), done)
    return {key: value for key in ("scores", "student_scores") if (value := getattr(run.method, key))}


@pytest.mark.parametrize("value", LEAST)
def test_what_a_weighting_needs_is_enough(value: str) -> None:
    found = ctpd(f"+stages.ctpd.method.{value}", *LEAST[value])
    students = {"student_scores": "score_student"} if SCORE_STUDENT[0] in LEAST[value] else {}
    assert found == {"scores": "score", **students}


@pytest.mark.parametrize(
    ("value", "left_out", "place"),
    [
        ("weights=contrastive_teacher", NO_TEACHER_PAIR, "stages.dpo_positive"),
        ("weights=average", ["stages.dpo_negative=null"], "stages.dpo_negative"),
        ("weights=contrastive_student", SCORE_STUDENT, "stages.dpo_student_positive"),
        ("weights=contrastive_student", STUDENT_PAIR, "stages.score_student"),
        ("weights=teacher_student", [], "stages.score_student"),
        ("weights=single_teacher", [], "stages.score.method.margin"),
        ("reference_model=student", [], "stages.score_student"),
    ],
)
def test_scores_that_no_stage_makes_are_missed_before_any_begins(value: str, left_out: list[str], place: str) -> None:
    with pytest.raises(InputError) as error:
        ctpd(f"+stages.ctpd.method.{value}", *left_out)
    assert error.value.place == place
    assert "ctpd" in error.value.expected


def test_a_contrastive_pair_of_ones_own_needs_no_stages() -> None:
    own = ["+stages.score.method.positive=mine/positive", "+stages.score.method.negative=mine/negative"]
    assert ctpd(*NO_TEACHER_PAIR, *own) == {"scores": "score"}


def test_tis_dpo_needs_the_students_pair() -> None:
    config = composed("pipeline", ["run_dir=run", *TIS_DPO])
    stage = next(stage for stage in STAGES if stage.name == "tis_dpo")
    with pytest.raises(InputError, match=r"stages\.dpo_student_positive: found null; expected .* tis_dpo builds on it"):
        stage_config(config, stage, {"sft_student": StageResult(Path("sft_student"), 0.0, skipped=True)})


def planned(*overrides: str) -> dict[str, list[tuple[str, int]]]:
    """Of each job the frozen models, by whose tokens they read and how many there are."""
    config = composed("pipeline", ["experiment=qwen2.5-7b_to_llama3.2-1b", *overrides])
    return {job.name: [(frozen.side, frozen.count) for frozen in job.frozen] for job in find_jobs(config)}


def test_the_planner_knows_which_stages_and_models_there_are() -> None:
    whole = planned()
    assert whole["score"] == [("teacher", 3)]
    single = planned("+stages.ctpd.method.weights=single_teacher", *LEAST["weights=single_teacher"])
    assert whole.keys() - single.keys() == {"dpo_positive", "dpo_negative"}
    assert single["score"] == [("teacher", 1)], "margins cost no pass of their own"
    student = planned("+stages.ctpd.method.reference_model=student", *STUDENT_PAIR, *SCORE_STUDENT, *TIS_DPO)
    assert student["score_student"] == [("student", 3)]
    assert student["tis_dpo"] == [("student", 3)]
    with pytest.raises(InputError, match=r"stages\.score\.method\.margin"):
        planned("+stages.ctpd.method.weights=single_teacher", *NO_TEACHER_PAIR)


def roles(cache: Path) -> set[str]:
    """Roles of a cache, each with shards."""
    found = {path.name.rsplit("-", 1)[0] for path in cache.glob("*.parquet")}
    assert found == set(read_manifest(cache)["teacher_weights"])
    return found


def first_loss(stage: Path) -> float:
    return json.loads((stage / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_stages_of_the_students_family_run_and_a_new_weighting_trains_the_student_alone(tmp_path: Path) -> None:
    world, run_dir = small_world(tmp_path / "world"), tmp_path / "run"
    overrides = [*recipe(world, run_dir), *NO_TEACHER_PAIR, *MARGIN, *STUDENT_PAIR, *SCORE_STUDENT, *TIS_DPO]
    # The recipe has values for stages that are left out here.
    overrides = [value for value in overrides if not value.startswith(("stages.dpo_positive.", "stages.dpo_negative."))]
    overrides += ["stages.dpo_student=null", "+stages.score_student.method.pairs_per_shard=10"]
    results = run_pipeline(composed("pipeline", [*overrides, "+stages.ctpd.method.weights=single_teacher"]))
    assert not any(result.skipped for result in results.values())
    assert results.keys().isdisjoint({"dpo_positive", "dpo_negative"})
    assert roles(results["score"].output) == {"reference", "margin"}
    students = {"student", "student_positive", "student_negative"}
    assert roles(results["score_student"].output) == students
    spans = [
        pq.read_table(results[name].output / f"{role}-00000.parquet")
        for name, role in (("score", "margin"), ("score_student", "student"))
    ]
    assert [len(row) for row in spans[0]["chosen"]] == [len(row) for row in spans[1]["chosen"]]
    # The cache was computed in other microbatches: a hundred tokens of a few nats, off by rounding, times beta.
    near = 0.1 * 100 * 5 * of_model(2, 48)
    assert first_loss(run_dir / "tis_dpo") == pytest.approx(math.log(2), abs=near)
    assert first_loss(run_dir / "ctpd") != pytest.approx(math.log(2), abs=10 * near)
    other = ["+stages.ctpd.method.weights=contrastive_student", "+stages.ctpd.method.reference_model=student"]
    again = run_pipeline(composed("pipeline", [*overrides, *other]))
    assert [name for name, result in again.items() if not result.skipped] == ["ctpd"]
    assert first_loss(run_dir / "ctpd") == pytest.approx(math.log(2), abs=near)
