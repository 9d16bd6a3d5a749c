"""What a run skips and what it does again; runs that were cut off."""

import json
import logging
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.forks.client import TOOLS, run_forked
from tests.pipeline.recipe import recipe
from tests.pipeline.stages.recipe_run import (
    ALL,
    STUDENT_ALONE,
    Finished,
    content,
    cut_off,
    done_again,
    exported,
    metrics,
    run,
    scores,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def test_a_second_run_skips_every_stage_says_so_and_touches_nothing(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = finished.copy(tmp_path / "run")
    before = content(tmp_path / "run")
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        results = run(overrides)
    assert done_again(results) == []
    said = [record.getMessage() for record in caplog.records]
    for name in ALL:
        assert f"{name:<13} skipped: complete, and nothing it depends on has changed" in said
    assert content(tmp_path / "run") == before


def test_how_the_work_is_cut_up_is_no_reason_to_do_it_again(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    other_cuts = ["data.microbatch_tokens=1024", "data.packing=padded", "data.num_workers=1", "trainer.log_every=3"]
    assert done_again(run([*overrides, *other_cuts, "parallel.distributed_optimizer=false"])) == []


def test_a_world_in_another_place_is_the_same_world(finished: Finished, tmp_path: Path) -> None:
    finished.copy(tmp_path / "run")
    moved = Path(shutil.copytree(finished.world.train.parent, tmp_path / "moved"))
    world = TinyWorld(*(moved / name for name in ("teacher", "student", "train.jsonl", "sft.jsonl", "test.jsonl")))
    assert done_again(run(recipe(world, tmp_path / "run"))) == []


def test_another_rate_in_one_stage_repeats_that_stage_and_those_that_build_on_it(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = finished.copy(tmp_path / "run")
    before = content(tmp_path / "run/dpo_positive")
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        results = run([*overrides, "stages.dpo_positive.optim.lr=6e-4"])
    assert done_again(results) == ["dpo_positive", "score", "ctpd"]
    assert content(tmp_path / "run/dpo_positive.old-1") == before
    assert any("what it had made is now in" in record.getMessage() for record in caplog.records)
    assert exported(tmp_path / "run", "dpo_positive") != exported(finished.run_dir, "dpo_positive")


def test_one_more_pair_repeats_the_stages_that_read_the_file(finished: Finished, tmp_path: Path) -> None:
    """Where a file is does not matter, and a stage may read one of its own."""
    own = Path(shutil.copy(finished.world.train, tmp_path))
    overrides = [*finished.copy(tmp_path / "run"), f"+stages.sft_student.data.train=[{own}]"]
    assert done_again(run(overrides)) == []
    with own.open("a") as file, finished.world.test.open() as more:
        file.write(more.readline())
    assert done_again(run([*overrides, "only=[sft_teacher,sft_student]"])) == ["sft_student"]
    assert (tmp_path / "run/sft_student.old-1/export").is_dir()


def test_other_weights_or_another_tokenizer_repeat_what_was_made_from_them(finished: Finished, tmp_path: Path) -> None:
    finished.copy(tmp_path / "run")
    moved = Path(shutil.copytree(finished.world.train.parent, tmp_path / "moved"))
    world = TinyWorld(*(moved / name for name in ("teacher", "student", "train.jsonl", "sft.jsonl", "test.jsonl")))
    template = moved / "student" / "chat_template.jinja"
    template.write_text("Be brief.\n" + template.read_text())
    overrides = [*recipe(world, tmp_path / "run"), "only=[sft_teacher,sft_student]"]
    assert done_again(run(overrides)) == ["sft_student"]
    config = moved / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-5}))
    assert done_again(run(overrides)) == ["sft_teacher"]


def test_a_stage_that_was_cut_off_goes_on_and_ends_with_the_same_bits(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = finished.copy(tmp_path / "run")
    cut_off(tmp_path / "run/ctpd")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"run/ctpd/checkpoints/step-{step:08d}")
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        results = run(overrides)
    assert done_again(results) == ["ctpd"]
    assert any(record.getMessage() == "ctpd          goes on where it was cut off" for record in caplog.records)
    assert any("ctpd          trained on 24 pairs" in record.getMessage() for record in caplog.records)
    assert exported(tmp_path / "run", "ctpd") == exported(finished.run_dir, "ctpd")
    # The log goes on as well, without the step that was done twice.
    assert metrics(tmp_path / "run", "ctpd") == metrics(finished.run_dir, "ctpd")


def test_a_run_does_not_go_on_with_scores_of_other_teachers(finished: Finished, tmp_path: Path) -> None:
    finished.copy(tmp_path / "run")
    manifest = tmp_path / "run/score/cache/manifest.json"
    teacher = json.loads(manifest.read_text())["teacher_weights"]["negative"]
    manifest.write_text(manifest.read_text().replace(teacher, "0" * 64))
    config = json.loads((tmp_path / "run/ctpd/config.json").read_text())
    config["method"]["scores"], config["run_dir"] = str(manifest.parent), str(tmp_path / "run/ctpd")
    with pytest.raises(InputError, match=r"resume, scores: found .*; expected what the checkpoint was"):
        train(run_config(OmegaConf.create(config)))


def test_a_stage_that_was_cut_off_after_its_last_step_only_exports(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    cut_off(tmp_path / "run/sft_student")
    assert done_again(run([*overrides, "only=[sft_student]"])) == ["sft_student"]
    assert exported(tmp_path / "run", "sft_student") == exported(finished.run_dir, "sft_student")


def test_an_export_that_was_deleted_is_made_again(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/sft_teacher/export")
    results = run(overrides)
    assert done_again(results) == ["sft_teacher"]
    assert exported(tmp_path / "run", "sft_teacher") == exported(finished.run_dir, "sft_teacher")


def test_scoring_that_was_cut_off_writes_the_missing_shards_alone(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    cut_off(tmp_path / "run/score")
    cache = tmp_path / "run/score/cache"
    for role in ("reference", "negative"):
        (cache / f"{role}-00002.parquet").unlink()
    before = content(cache)
    assert done_again(run([*overrides, "only=[score]"])) == ["score"]
    after = content(cache)
    assert {name for name, file in after.items() if before.get(name) != file} == {
        "manifest.json",
        "reference-00002.parquet",
        "negative-00002.parquet",
    }
    assert scores(tmp_path / "run") == scores(finished.run_dir)


def test_a_stage_that_is_begun_and_then_gets_other_inputs_does_not_go_on(finished: Finished, tmp_path: Path) -> None:
    overrides = finished.copy(tmp_path / "run")
    cut_off(tmp_path / "run/ctpd")
    shutil.rmtree(tmp_path / "run/ctpd/checkpoints/step-00000003")
    assert done_again(run([*overrides, "stages.ctpd.method.beta=0.2"])) == ["ctpd"]
    assert (tmp_path / "run/ctpd.old-1/checkpoints/step-00000002").is_dir()
    assert metrics(tmp_path / "run", "ctpd")[0]["reward_chosen"] == pytest.approx(
        2 * metrics(finished.run_dir, "ctpd")[0]["reward_chosen"]
    )


def test_a_killed_process_goes_on_and_ends_with_the_same_bits(finished: Finished, tmp_path: Path) -> None:
    long = [*STUDENT_ALONE, "trainer.max_steps=8", "trainer.epochs=100", "trainer.checkpoint_every=3"]
    overrides = [*recipe(finished.world, tmp_path / "killed"), *long]
    checkpoints = tmp_path / "killed/sft_student/checkpoints"
    fault = {"point": "after a row", "nth": 5, "rank": 0, "signal": int(signal.SIGKILL)}
    done = run_forked(tmp_path, program=str(TOOLS / "pipeline.py"), arguments=overrides, fault=fault)
    assert done.statuses == [-signal.SIGKILL], done.stderr
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000003"]
    assert not (tmp_path / "killed/sft_student/export").exists()
    assert done_again(run(overrides)) == ["sft_student"]
    run([*recipe(finished.world, tmp_path / "never"), *long])
    assert exported(tmp_path / "killed", "sft_student") == exported(tmp_path / "never", "sft_student")
    assert metrics(tmp_path / "killed", "sft_student") == metrics(tmp_path / "never", "sft_student")
