"""Pairs encoded ahead: one dataset for each way of reading, shared by all stages, and the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.encode import encode
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import SMALL_BATCHES, composed, recipe, small_world
from tests.pipeline.tool import run_tool

TIMES = ("step_seconds", "tokens_per_second", "data_wait_seconds", "data_wait_share")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("encode") / "world")


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_pipeline_finds_what_was_encoded_ahead_for_all_its_stages(world: TinyWorld, tmp_path: Path) -> None:
    """The tokenizers of what the stages export included."""
    overrides = recipe(world, tmp_path / "run")
    folders = encode(composed("encode", overrides))
    assert len(folders) == 3, "teacher alone, student alone, and both"
    assert {folder.parent for folder in folders} == {tmp_path / "run/encoded"}
    before = content(tmp_path / "run/encoded")
    run_pipeline(composed("pipeline", [*overrides, "data.encoded=auto"]))
    assert content(tmp_path / "run/encoded") == before


def dpo(world: TinyWorld, run_dir: Path, *more: str) -> Path:
    train(
        run_config(
            composed(
                "train",
                [
                    "method=dpo",
                    f"model.student.path={world.student}",
                    f"data.train=[{world.train}]",
                    f"data.validation=[{world.test}]",
                    f"run_dir={run_dir}",
                    *SMALL_BATCHES,
                    "trainer.epochs=2",
                    "optim.lr=1e-3",
                    *more,
                ],
            )
        )
    )
    return run_dir


@pytest.fixture(scope="module")
def on_the_fly(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dpo(world, tmp_path_factory.mktemp("fly") / "run")


def test_training_computes_the_same_from_encoded_pairs(world: TinyWorld, on_the_fly: Path, tmp_path: Path) -> None:
    run_dir = dpo(world, tmp_path / "run", "data.encoded=auto", "data.num_workers=2")
    assert metrics(run_dir) == metrics(on_the_fly)
    assert sum("val_loss" in row for row in metrics(run_dir)) == 1
    shards = list((tmp_path / "encoded").glob("*/shard-*"))
    assert len(shards) == 2, "training pairs and held-out ones"
    times = [
        json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "val_loss" not in line
    ]
    assert all(row["data_wait_seconds"] >= 0 and 0 <= row["data_wait_share"] < 1 for row in times)
    assert [row["data_wait_share"] for row in times[:2]] == [0, 0], "the start of the workers is not counted"
    assert times[-1]["data_wait_share"] > 0


def test_damage_stops_the_job_and_names_the_file(world: TinyWorld, on_the_fly: Path, tmp_path: Path) -> None:
    encoded = tmp_path / "encoded"
    dpo(world, tmp_path / "run", f"data.encoded={encoded}", "trainer.max_steps=1")
    (ids,) = (path for path in encoded.glob("*/shard-00000/ids.npy") if b"train" in path.read_bytes())
    ids.write_bytes(ids.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=rf"{ids}: found CRC-32 .*; expected .*remove {ids.parent} to encode it again"):
        dpo(world, tmp_path / "again", f"data.encoded={encoded}", "trainer.max_steps=1")


@pytest.mark.slow
def test_one_of_two_processes_encodes_and_both_read(world: TinyWorld, tmp_path: Path) -> None:
    arguments = [*recipe(world, tmp_path / "run"), "only=[sft_student]", "data.encoded=auto"]
    status, _, stderr = run_tool("pipeline.py", arguments, tmp_path, processes=2)
    assert status == 0, stderr
    assert len(list((tmp_path / "run/encoded").glob("*/shard-*"))) == 1
    before = content(tmp_path / "run/encoded")
    status, _, stderr = run_tool("encode.py", arguments[:-1], tmp_path)
    assert status == 0, stderr
    assert content(tmp_path / "run/encoded") == before


@pytest.mark.slow
def test_bad_input_met_by_the_process_that_encodes_stops_all(world: TinyWorld, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    rows[5]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    arguments = [*recipe(world, tmp_path / "run"), "only=[sft_student]", "data.encoded=auto", f"data.train=[{data}]"]
    arguments.append(f"model.student.chat_template={template}")
    status, _, stderr = run_tool("pipeline.py", arguments, tmp_path, processes=2)
    assert status == 1
    assert stderr.count("error: ") == 1
    assert f"error: {data}:6, " in stderr
