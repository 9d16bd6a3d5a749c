"""The recipe as one run: what it leaves, what it skips, what it does again, and how it goes on."""

import dataclasses
import json
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctpd_nemo.data.encode import EncodedPair, PairEncoder, Skipped
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, recipe, small_world
from tests.pipeline.tool import kill, run_tool, started

# What runs unless it is asked for more, and the DPO baseline.
OF_STUDENT_PAIR = {"dpo_student_positive", "dpo_student_negative", "score_student", "tis_dpo"}
DISTILLATION = {"uld", "dskd", "multilevel_ot"}
ALL = [stage.name for stage in STAGES if stage.name not in OF_STUDENT_PAIR | DISTILLATION]
TRAINED = [name for name in ALL if name != "score"]
STUDENT_ALONE = [f"stages.{name}=null" for name in ALL if name != "sft_student"]


@pytest.fixture(scope="module", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """As the tools have here: sums in another order would not be equal bit for bit."""
    quiet.after_imports()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A recipe that ran through, never interrupted."""

    world: TinyWorld
    run_dir: Path
    results: dict[str, StageResult]

    def copy(self, folder: Path) -> list[str]:
        """Overrides to run the same again on a copy of what it left."""
        shutil.copytree(self.run_dir, folder)
        return recipe(self.world, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("recipe")
    world = small_world(home / "world")
    return Finished(world, home / "run", run(recipe(world, home / "run")))


def run(overrides: list[str]) -> dict[str, StageResult]:
    return run_pipeline(composed("pipeline", overrides))


def done_again(results: dict[str, StageResult]) -> list[str]:
    return [name for name, result in results.items() if not result.skipped]


def exported(run_dir: Path, stage: str) -> dict[str, bytes]:
    # The card and its record name the run's own folders.
    files = (
        path for path in (run_dir / stage / "export").iterdir() if path.name not in ("README.md", "ctpd_nemo.json")
    )
    return {path.name: path.read_bytes() for path in files}


def scores(run_dir: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pydict() for path in sorted((run_dir / "score/cache").glob("*.parquet"))}


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and name != "data_wait_share"}
        for row in rows
    ]


def cut_off(stage_dir: Path) -> None:
    """Leave a complete stage as one that was killed: nothing says that it is complete, and there is no output."""
    status = stage_dir / "stage.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "complete": False}))
    shutil.rmtree(stage_dir / "export", ignore_errors=True)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# What a run leaves


def test_every_stage_leaves_its_output(finished: Finished) -> None:
    assert list(finished.results) == ALL
    assert done_again(finished.results) == ALL
    for name, result in finished.results.items():
        folder = finished.run_dir / name
        assert result.output == folder / ("cache" if name == "score" else "export")
        assert json.loads((folder / "stage.json").read_text())["complete"]
    assert len(scores(finished.run_dir)) == 3 * 3


@pytest.mark.parametrize("stage", TRAINED)
def test_every_trained_model_loads_in_transformers_and_has_changed(finished: Finished, stage: str) -> None:
    folder = finished.results[stage].output
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    run_config = json.loads((finished.run_dir / stage / "config.json").read_text())
    started_from = load_file(Path(run_config["model"][run_config["policy"]]["path"]) / "model.safetensors")
    trained = dict(model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in trained.values())
    assert not any(torch.equal(trained[name], tensor) for name, tensor in started_from.items() if name in trained)


def test_every_export_has_a_card_that_names_the_models_it_began_with(finished: Finished) -> None:
    for stage, bases in (("ctpd", ["student", "teacher"]), ("dpo_student", ["student"]), ("dpo_negative", ["teacher"])):
        card = ModelCard.load(finished.results[stage].output / "README.md")
        assert card.data.base_model == bases, stage
        assert "`optim.lr`" in card.text


def test_the_contrastive_pair_moves_apart_from_the_sft_teacher(finished: Finished) -> None:
    """Its preference margins have opposite signs: DPO raises that of the chosen, reverse DPO that of the rejected."""
    last = {name: metrics(finished.run_dir, name)[-1] for name in ("dpo_positive", "dpo_negative")}
    assert last["dpo_positive"]["margin"] > 0
    assert last["dpo_negative"]["margin"] > 0
    table = scores(finished.run_dir)
    shards = [(table[f"positive-0000{i}.parquet"], table[f"negative-0000{i}.parquet"]) for i in range(3)]
    chosen, rejected = (
        sum(np.sum(up) - np.sum(down) for p, n in shards for up, down in zip(p[side], n[side], strict=True))
        for side in ("chosen", "rejected")
    )
    assert chosen > rejected


def test_what_was_trained_on_and_what_was_left_out_is_told_at_the_end(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = Side(AutoTokenizer.from_pretrained(finished.world.student))
    pairs = open_preferences(finished.world.train)
    encoded = PairEncoder(side, None, include_eos=True, max_length=30).encode(range(len(pairs)), pairs[:])
    skipped = Counter(pair.reason for pair in encoded if isinstance(pair, Skipped))
    truncated = sum(pair.chosen.truncated for pair in encoded if isinstance(pair, EncodedPair))
    assert set(skipped) == {"too_long", "equal_after_truncation"}
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        run([*recipe(finished.world, tmp_path / "run"), *STUDENT_ALONE, "data.max_length=30"])
    (line,) = [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]
    reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
    counts, waited = line.split("; ")
    assert re.fullmatch(r"\d+\.\d\d% of step time spent waiting for data", waited)
    assert counts == (
        f"sft_student   trained on {24 - skipped.total()} pairs, {skipped.total()} skipped ({reasons}), "
        f"{truncated} responses truncated"
    )
    rows = metrics(tmp_path / "run", "sft_student")
    assert sum(row["skipped"] for row in rows) == skipped.total()
    assert sum(row["truncated"] for row in rows) == truncated


def test_a_run_that_can_use_no_pair_at_all_stops(finished: Finished, tmp_path: Path) -> None:
    overrides = [*recipe(finished.world, tmp_path / "run"), *STUDENT_ALONE, "data.max_length=20"]
    # The second time it goes on from its last checkpoint.
    for _ in range(2):
        with pytest.raises(InputError, match=r"train\.jsonl: found 0 pairs, 24 skipped \(too_long 24\)"):
            run(overrides)
    assert not (tmp_path / "run/sft_student/export").exists()


# What a run skips, and what it does again


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
    template.write_text(template.read_text().replace("assistant", "helper"))
    overrides = [*recipe(world, tmp_path / "run"), "only=[sft_teacher,sft_student]"]
    assert done_again(run(overrides)) == ["sft_student"]
    config = moved / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-5}))
    assert done_again(run(overrides)) == ["sft_teacher"]


# How a run goes on


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
    long = [*STUDENT_ALONE, "trainer.max_steps=60", "trainer.epochs=100", "trainer.checkpoint_every=10"]
    overrides = [*recipe(finished.world, tmp_path / "killed"), *long]
    checkpoints = tmp_path / "killed/sft_student/checkpoints"
    with started("pipeline.py", overrides, tmp_path) as process:
        while not (checkpoints / "step-00000010").is_dir():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        kill(process)
    assert not (checkpoints / "step-00000060").exists()
    assert not (tmp_path / "killed/sft_student/export").exists()
    assert done_again(run(overrides)) == ["sft_student"]
    run([*recipe(finished.world, tmp_path / "never"), *long])
    assert exported(tmp_path / "killed", "sft_student") == exported(tmp_path / "never", "sft_student")
    assert metrics(tmp_path / "killed", "sft_student") == metrics(tmp_path / "never", "sft_student")


# Single stages


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


# Layouts


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
            assert (two[tensor] - values).norm() <= 1e-5 * values.norm(), f"{name}: {tensor}"
    one_scores, two_scores = scores(finished.run_dir), scores(tmp_path / "run")
    assert one_scores.keys() == two_scores.keys()
    for shard, table in one_scores.items():
        assert two_scores[shard]["pair_id"] == table["pair_id"]
        for side in ("chosen", "rejected"):
            for found, expected in zip(two_scores[shard][side], table[side], strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Every rank was there, and one alone spoke.
    assert stderr.count("ctpd          begins") == 1
