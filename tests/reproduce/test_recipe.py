"""Variants of stages, and what each table needs of them."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.pipeline.recipe import find_stages, needed_stages, stage_values
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline, stage_config
from ctpd_nemo.reproduce.config import known_tables, read_table, split_config
from tests.pipeline.recipe import composed

PAPER = ["paper_qwen2.5-14b_to_llama3.1-8b", "paper_qwen2.5-7b_to_llama3.2-1b"]
PAIR = ["dpo_positive", "dpo_negative", "score"]
STUDENT_PAIR = {"dpo_student_positive", "dpo_student_negative"}


def recipe_of(experiment: str = "tiny", *overrides: str) -> DictConfig:
    return split_config(composed("reproduce", [f"experiment={experiment}", "run_dir=run", *overrides]))[1]


def stages_of_table(number: int, experiment: str = "tiny") -> list[str]:
    return needed_stages(recipe_of(experiment), list(read_table(number).rows.values()))


@pytest.mark.parametrize("experiment", ["tiny", *PAPER])
@pytest.mark.parametrize("number", known_tables())
def test_stages_stand_behind_what_they_build_on(experiment: str, number: int) -> None:
    config = recipe_of(experiment)
    needed = stages_of_table(number, experiment)
    stages = {stage.name: stage for stage in find_stages(config)}
    for at, name in enumerate(needed):
        assert set(stages[name].builds_on(config).values()) <= set(needed[:at]), name


def test_a_table_runs_what_it_needs_and_no_more() -> None:
    assert stages_of_table(3) == [
        "sft_teacher",
        "sft_student",
        *PAIR,
        "score_student",
        "ctpd",
        "ctpd-student_reference",
    ]
    assert set(stages_of_table(1)) & set(stages_of_table(2)) >= STUDENT_PAIR
    assert "score_student-pair" not in stages_of_table(1)
    assert {"dpo_student", "tis_dpo"} <= set(stages_of_table(1)) - set(stages_of_table(2))


def test_every_method_of_the_tables_is_trained_alike_but_for_the_method() -> None:
    """Same data, rate, steps and layout: what differs between rows is the row."""
    config = recipe_of()
    stages = {stage.name: stage for stage in find_stages(config)}
    done = {name: StageResult(Path("done") / name, 0.0, skipped=True) for name in stages}
    rows = {stage for number in known_tables() for stage in read_table(number).rows.values()} - {"sft_student"}
    runs = {name: stage_config(config, stages[name], done) for name in rows}
    first = runs["ctpd"]
    for name, run in runs.items():
        assert (run.data, run.optim, run.trainer, run.seed) == (first.data, first.optim, first.trainer, first.seed), (
            name
        )
        assert METHODS[run.method.name]
    weights = {name: run.method.weights for name, run in runs.items() if name.startswith("ctpd")}
    assert len(set(weights.values())) == len(weights) - 1
    assert weights["ctpd"] == weights["ctpd-student_reference"] == "contrastive_teacher"


def test_a_variant_has_the_values_of_its_stage_where_it_has_none_of_its_own() -> None:
    config = recipe_of("tiny", "stages.ctpd.optim.lr=7e-4", "+stages.ctpd-random.optim={lr:3e-4}")
    values = {stage.name: stage_values(config, stage) for stage in find_stages(config)}
    assert values["ctpd"]["optim"]["lr"] == values["ctpd-average"]["optim"]["lr"] == 7e-4
    assert values["ctpd-random"]["optim"]["lr"] == 3e-4
    assert values["ctpd-random"]["method"] == values["ctpd"]["method"] | {"weights": "random"}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"ctpt-random": {}}, r"stages\.ctpt-random: found a stage that is not known; expected one of sft_teacher"),
        ({"ctpd-": {}}, r"stages\.ctpd-: found a stage that is not known"),
        ({"ctpd-../up": {}}, r"stages\.ctpd-\.\./up: found a stage that is not known"),
        ({"ctpd-a": 3}, r"stages\.ctpd-a: found 3; expected values of the stage"),
        ({"ctpd-a": {"inputs": {"method.score": "score"}}}, r"inputs, method\.score: found no input of this stage"),
        ({"ctpd-a": {"inputs": {"method.scores": "sore"}}}, r"inputs, method\.scores: found 'sore'; expected a stage"),
        ({"score-a": {"inputs": {"method.positive": "ctpd"}}}, r"inputs, method\.positive: found 'ctpd'; expected a"),
    ],
)
def test_a_variant_that_cannot_be_is_named(stages: dict[str, object], said: str) -> None:
    config = composed("pipeline", [])
    OmegaConf.set_struct(config, False)
    config.merge_with({"stages": stages})
    with pytest.raises(InputError, match=said):
        run_pipeline(config)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("table=4", "table: found 4; expected one of 1, 2, 3"),
        ("seeds=[]", r"seeds: found \[\]; expected one or more"),
        ("seeds=[1,1]", "each once"),
        ("launch=ssh", "launch: found 'ssh'; expected print or slurm"),
        ("processes=0", "processes: found 0"),
    ],
)
def test_values_that_cannot_be_used_are_named(changed: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        split_config(composed("reproduce", [changed]))
