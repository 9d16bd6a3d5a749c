"""Single stages, and stages of other layouts."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ctpd_nemo.errors import InputError
from tests.pipeline.recipe import recipe
from tests.pipeline.stages.recipe_run import TRAINED, Finished, content, done_again, exported, run, scores
from tests.pipeline.tool import run_tool
from tests.rounding import of_model

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

# Of two models of two layers, whose products have sums of 48 terms at the most.
TOLERANCE = 2 * of_model(2, 48)


def test_a_single_stage_runs_where_what_it_builds_on_is_there(finished: Finished, tmp_path: Path) -> None:
    overrides = recipe(finished.world, tmp_path / "run")
    assert list(run([*overrides, "only=[sft_student]"])) == ["sft_student"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".sft_student.lock", "sft_student"]
    results = run([*overrides, "only=[dpo_student]"])
    assert done_again(results) == ["dpo_student"]
    assert exported(tmp_path / "run", "dpo_student") == exported(finished.run_dir, "dpo_student")


@pytest.mark.parametrize(("stage", "missing"), [("ctpd", "sft_student"), ("score", "sft_student")])
def test_a_single_stage_names_what_is_not_there(finished: Finished, tmp_path: Path, stage: str, missing: str) -> None:
    with pytest.raises(InputError) as error:
        run([*recipe(finished.world, tmp_path / "run"), f"only=[{stage}]"])
    assert error.value.place == f"stages.{missing}"
    assert str(tmp_path / "run" / missing) in error.value.found
    assert stage in error.value.expected
    assert not (tmp_path / "run").exists()


def test_a_single_stage_does_not_build_on_what_is_out_of_date(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(InputError, match=r"stages\.score"):
        run([*overrides, "stages.dpo_positive.optim.lr=1e-4", "only=[ctpd]"])
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("overrides", [["only=[grpo]"], ["+stages.grpo={}"], ["only=[ctpd]", "stages.ctpd=null"]])
def test_an_unknown_stage_is_named(finished: Finished, tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(InputError, match=r"grpo|ctpd"):
        run([*recipe(finished.world, tmp_path / "run"), *overrides])
    assert not (tmp_path / "run").exists()


def test_stages_of_other_layouts_give_the_same_models_and_scores(finished: Finished, tmp_path: Path) -> None:
    """Two processes: tensor, pipeline, sequence and data parallelism, each in one stage or more."""
    layouts = {
        "sft_teacher": "{tensor:2}",
        "sft_student": "{pipeline:2}",
        "dpo_positive": "{pipeline:2}",
        "dpo_negative": "{tensor:2,sequence:true}",
        "score": "{tensor:2}",
        "dpo_student": "{tensor:1}",
        "ctpd": "{pipeline:2}",
    }
    overrides = [f"+stages.{name}.parallel={layout}" for name, layout in layouts.items() if name != "dpo_student"]
    status, _, stderr = run_tool("pipeline.py", [*recipe(finished.world, tmp_path / "run"), *overrides], tmp_path, 2)
    assert status == 0, stderr
    for name in TRAINED:
        one, two = (
            load_file(home / name / "export/model.safetensors") for home in (finished.run_dir, tmp_path / "run")
        )
        for tensor, values in one.items():
            assert (two[tensor] - values).norm() <= TOLERANCE * values.norm(), f"{name}: {tensor}"
    one_scores, two_scores = scores(finished.run_dir), scores(tmp_path / "run")
    assert one_scores.keys() == two_scores.keys()
    for shard, table in one_scores.items():
        assert two_scores[shard]["pair_id"] == table["pair_id"]
        for side in ("chosen", "rejected"):
            for found, expected in zip(two_scores[shard][side], table[side], strict=True):
                np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    # Every rank was there, and one alone spoke.
    assert stderr.count("ctpd          begins") == 1
