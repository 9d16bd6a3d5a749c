"""What a run shows of itself, cut off and gone on: logs without double steps, a record of each start, bar and lines."""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.origin import read_config, read_starts
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import CONF, SMALL_BATCHES, composed, small_job, small_world

STEPS = 6


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("seen") / "world")


def sft(world: TinyWorld, run_dir: Path, *more: str) -> None:
    overrides = small_job(
        world,
        run_dir,
        "sft",
        f"data.validation=[{world.test}]",
        f"trainer.max_steps={STEPS}",
        "trainer.epochs=2",
        "trainer.checkpoint_every=2",
        "trainer.validate_every=2",
        "trainer.log_every=1",
        *more,
    )
    train(run_config(composed("train", overrides)))


def cut_back(run_dir: Path) -> None:
    """To step 4, as if the process had died before its last checkpoint; the logs go on to step 6."""
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    (run_dir / "checkpoints" / "latest").write_text("step-00000004\n")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the job that went on said."""
    return []


@pytest.fixture(scope="module")
def gone_on(world: TinyWorld, lines: list[str]) -> Path:
    """The run folder of a job that died after step 6 and did two steps again."""
    run_dir = world.train.parent / "run"
    sft(world, run_dir)
    cut_back(run_dir)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    told = logging.getLogger("ctpd_nemo")
    level = told.level
    told.addHandler(handler)
    told.setLevel(logging.INFO)
    try:
        sft(world, run_dir)
    finally:
        told.removeHandler(handler)
        told.setLevel(level)
    return run_dir


def steps_of(rows: list[dict[str, Any]], metric: str) -> list[int]:
    return [row["step"] for row in rows if metric in row]


def test_no_log_has_a_step_twice(gone_on: Path) -> None:
    rows = [json.loads(line) for line in (gone_on / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(rows, "loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(rows, "val_loss") == [2, 4, 6]
    drawn = EventAccumulator(str(gone_on / "logs"))
    drawn.Reload()
    for metric in ("loss", "grad_norm", "tokens_per_second", "val_loss"):
        points = drawn.Scalars(metric)
        assert [point.step for point in points] == steps_of(rows, metric), metric
        logged = [row[metric] for row in rows if metric in row]
        assert [point.value for point in points] == pytest.approx(logged, rel=1e-6)


def test_a_run_that_is_done_keeps_its_last_step_when_it_is_started_again(world: TinyWorld, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for _ in range(2):
        sft(world, run_dir)
    drawn = EventAccumulator(str(run_dir / "logs")).Reload()
    assert [point.step for point in drawn.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [point.step for point in drawn.Scalars("val_loss")] == [2, 4, 6]


def test_lines_of_a_run_that_goes_on_count_the_whole_run(gone_on: Path, lines: list[str]) -> None:
    steps = [line for line in lines if re.search(r"step \d+ of \d+", line)]
    assert [re.findall(r"step (\d+) of (\d+)", line)[0] for line in steps] == [("5", "6"), ("6", "6")]
    assert steps[-1].endswith("0:00:00 left")


def test_every_start_is_recorded_with_all_that_numbers_depend_on(gone_on: Path, world: TinyWorld) -> None:
    first, second = read_starts(gone_on)
    assert (first["step"], second["step"]) == (0, 4)
    assert first["config"] == second["config"] == read_config(gone_on)
    assert {"method", "data", "optim", "parallel", "precision", "trainer", "seed", "deterministic"} <= set(
        first["config"]
    )
    assert {"python", "torch", "megatron-core", "nemo-toolkit", "transformers", "numpy"} <= set(first["packages"])
    checkout = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CONF, capture_output=True, text=True, check=False)
    assert first["commit"] == (checkout.stdout.strip() or None)
    prints = first["fingerprints"]
    assert {"data", "validation", "policy_tokenizer", "policy_template", "policy_weights"} <= set(prints)
    assert prints == second["fingerprints"]


def test_the_last_heartbeat_says_that_the_job_is_done(gone_on: Path) -> None:
    told = json.loads((gone_on / "heartbeat.json").read_text())
    assert (told["state"], told["step"], told["steps"]) == ("finished", STEPS, STEPS)
    assert Path(told["last_checkpoint"]).name == f"step-{STEPS:08d}"
    assert told["tokens_per_second"] > 0


def test_on_a_terminal_the_bar_goes_over_the_whole_run(
    gone_on: Path, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Path(shutil.copytree(gone_on, tmp_path / "again"))
    cut_back(again)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    sft(world, again)
    shown = terminal.getvalue().split("\r")
    bars = [re.findall(r"^again: +(\d+)%.* (\d+)/(\d+) \[[\d:]+<([\d:?]+)", frame) for frame in shown]
    seen = list(dict.fromkeys(found[0][:3] for found in bars if found))
    assert seen == [("67", "4", "6"), ("83", "5", "6"), ("100", "6", "6")]
    left = [found[0][3] for found in bars if found]
    assert left[0] == "?", "nothing is known before a step"
    assert left[-1] == "00:00"
    assert "loss=" in shown[-1]
    assert "v_num" not in terminal.getvalue()


def test_scoring_is_recorded_and_its_shards_are_told(world: TinyWorld, tmp_path: Path) -> None:
    overrides = [
        f"model.student.path={world.student}",
        f"model.teacher.path={world.teacher}",
        f"data.train=[{world.train}]",
        f"run_dir={tmp_path / 'run'}",
        f"method.cache={tmp_path / 'cache'}",
        f"method.reference={world.teacher}",
        "method.pairs_per_shard=10",
        *SMALL_BATCHES,
    ]
    score(run_config(composed("score", overrides)))
    (start,) = read_starts(tmp_path / "run")
    assert start["config"] == read_config(tmp_path / "run")
    assert {"data", "teacher_tokenizer", "student_template", "reference_weights"} <= set(start["fingerprints"])
    told = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert (told["state"], told["shards_done"], told["shards"]) == ("finished", 3, 3)
    assert told["tokens_per_second"] > 0


# Weights & Biases


def test_without_the_package_the_flag_says_how_to_get_it(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctpd_nemo.pipeline.wandb_run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("trainer.wandb: found no package wandb; expected it: pip install")):
        sft(world, tmp_path / "run", "trainer.wandb=true")
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_one_run_of_weights_and_biases(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_dir = tmp_path / "run"
    for _ in range(2):
        sft(world, run_dir, "trainer.wandb=a-project")
        cut_back(run_dir)
    kept = (run_dir / "logs" / "wandb" / "run-id").read_text().strip()
    runs = [path.name for path in (run_dir / "logs" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(name.endswith(f"-{kept}") for name in runs)
    assert "wandb:" not in "".join(capfd.readouterr())
