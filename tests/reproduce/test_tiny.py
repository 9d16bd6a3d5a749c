"""A table in a nano world: stages are shared, students evaluated once, and a run that was killed goes on."""

import json
import logging
import time
from pathlib import Path

import pytest

from ctpd_nemo.reproduce.config import split_config
from ctpd_nemo.reproduce.seed import run_seed
from tests.pipeline.recipe import composed
from tests.pipeline.tool import kill, run_tool, started

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

TABLE_3 = ["sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "score", "score_student", "ctpd"]


def test_students_share_stages_and_are_evaluated_once(
    nano: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked, recipe = split_config(composed("reproduce", [*nano, f"run_dir={tmp_path}"]))

    def evaluated(students: list[str]) -> tuple[list[str], list[str]]:
        """The stages that were done, and the students that were evaluated."""
        caplog.clear()
        with caplog.at_level(logging.INFO, "ctpd_nemo.reproduce"):
            run = run_seed(recipe, asked.world, asked.evaluation, 1, students)
        said = [record.getMessage().split() for record in caplog.records]
        return list(run["stage_seconds"]), [words[0] for words in said if words[1] == "evaluated"]

    students = ["ctpd", "ctpd-student_reference"]
    assert evaluated(students) == ([*TABLE_3, "ctpd-student_reference"], students)
    folder = tmp_path / "seed-1"
    sft = [json.loads((folder / name / "config.json").read_text()) for name in ("sft_teacher", "ctpd")]
    assert [Path(run["data"]["train"][0]).name for run in sft] == ["sft.jsonl", "train.jsonl"]
    assert {run["seed"] for run in sft} == {1}
    found = json.loads((folder / "ctpd/export/evaluation.json").read_text())["preferences"]
    assert (found["n"], found["sampled_answer_accuracy"] is None) == (6, False)

    # Another table: what it shares with the first is there.
    assert evaluated(["ctpd", "ctpd-uniform"]) == (["ctpd-uniform"], ["ctpd-uniform"])
    assert evaluated(["ctpd", "ctpd-uniform"]) == ([], [])
    asked.evaluation.seed += 1
    assert evaluated(["ctpd"]) == ([], ["ctpd"])
    # On other pairs, by hand.
    found["n"] = 1
    (folder / "ctpd/export/evaluation.json").write_text(json.dumps({"preferences": found}))
    assert evaluated(["ctpd"]) == ([], ["ctpd"])


@pytest.mark.slow
def test_a_table_that_was_killed_goes_on_and_ends_with_the_same_numbers(nano: list[str], tmp_path: Path) -> None:
    arguments = [*nano, "table=3", "seeds=[0,1]"]
    status, printed, errors = run_tool("reproduce.py", [*arguments, f"run_dir={tmp_path}/whole"], tmp_path)
    assert status == 0, errors
    assert "Table 3. Reference model: mean ± standard error over 2 seeds" in printed
    cut = tmp_path / "cut"
    with started("reproduce.py", [*arguments, f"run_dir={cut}"], tmp_path) as process:
        while not list(cut.glob("seed-*/dpo_positive/export")):
            assert process.poll() is None
            time.sleep(0.05)
        kill(process)
    status, again, errors = run_tool("reproduce.py", [*arguments, f"run_dir={cut}"], tmp_path)
    assert status == 0, errors
    assert "skipped: complete" in errors
    assert again == printed
    whole, after = (json.loads((folder / "table-3.json").read_text()) for folder in (tmp_path / "whole", cut))
    assert after["rows"] == whole["rows"]
    assert after["rows"]["Origin"]["answers, greedy"]["values"]
