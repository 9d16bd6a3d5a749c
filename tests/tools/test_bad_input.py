"""Bad input stops a job with one clear error, and nothing that was there is lost."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.pipeline import entry
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, recipe
from tests.pipeline.tool import run_tool
from tests.tools.refusal import Rows, content, edited, refused, values

# Rows


def test_a_malformed_json_line_is_named_by_file_and_line(world: TinyWorld, tmp_path: Path, run_dir: Path) -> None:
    lines = world.train.read_text().splitlines(keepends=True)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join([*lines[:4], lines[4][:40] + "\n", *lines[5:]]))
    error = refused(train, values(world, run_dir, data={"train": [str(path)]}), run_dir)
    assert error.place == f"{path}:5"
    assert error.found.startswith("malformed JSON")


@pytest.mark.parametrize(
    ("change", "place", "found"),
    [
        ({"chosen": None}, "field 'chosen'", "null"),
        ({"rejected": ...}, "field 'rejected'", "no such field"),
        ({"prompt": ...}, "field 'prompt'", "no such field"),
        ({"prompt": []}, "field 'prompt'", "no messages"),
        ({"chosen": ""}, "field 'chosen'", "no text"),
        ({"chosen": [{"role": "assistant", "content": " \n"}]}, "field 'chosen[0]'", "white space only"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_missing_or_empty_field_is_named(
    world: TinyWorld, tmp_path: Path, run_dir: Path, change: dict[str, Any], place: str, found: str
) -> None:
    def edit(rows: Rows) -> None:
        rows[2] |= change
        rows[2] = {name: value for name, value in rows[2].items() if value is not ...}

    path = edited(world, tmp_path, edit)
    error = refused(train, values(world, run_dir, data={"train": [str(path)]}), run_dir)
    assert error.place == f"{path}:3, {place}"
    assert error.found == found


def test_chosen_equal_to_rejected_is_named(world: TinyWorld, tmp_path: Path, run_dir: Path) -> None:
    path = edited(world, tmp_path, lambda rows: rows[1].update(chosen=rows[1]["rejected"]))
    error = refused(train, values(world, run_dir, data={"train": [str(path)]}), run_dir)
    assert error.place == f"{path}:2, field 'rejected'"
    assert error.expected == "two different responses"


def test_bad_rows_can_be_skipped_and_are_counted(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(rows: Rows) -> None:
        rows[1]["chosen"] = rows[1]["rejected"]
        rows[2]["chosen"] = ""

    path = edited(world, tmp_path, edit)
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        train(run_config(values(world, tmp_path / "run", data={"train": [str(path)], "on_bad": "skip"})))
    said = [record.getMessage() for record in caplog.records]
    assert any("Skipped 2 of 24 rows (equal_responses 1, empty_field 1)" in line for line in said)
    assert any("trained on 22 pairs, 0 skipped" in line for line in said)


def test_a_pair_that_no_truncation_can_fit_is_counted_and_reported(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By scoring, and by the training that reads those scores."""
    path = edited(world, tmp_path, lambda rows: rows[3]["prompt"][0].update(content="What is 1 plus 1? " * 50))
    cache = tmp_path / "cache"
    roles = dict.fromkeys(("reference", "positive", "negative"), str(world.teacher))
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        for method in (
            {"name": "score", "cache": str(cache), **roles},
            {"name": "ctpd", "scores": str(cache)},
        ):
            job = score if method["name"] == "score" else train
            job(run_config(values(world, tmp_path / method["name"], data={"train": [str(path)]}, method=method)))
    said = [record.getMessage() for record in caplog.records]
    for done in ("scored", "trained on"):
        assert any(f"{done} 23 pairs, 1 skipped (too_long 1), 0 responses truncated; " in line for line in said)
    rows = [json.loads(line) for line in (tmp_path / "ctpd/metrics.jsonl").read_text().splitlines()]
    assert sum(row["skipped"] for row in rows) == 1


# Files and folders


@pytest.mark.parametrize(
    ("train_files", "place", "found"),
    [
        ([], "data.train", "no files"),
        (["nowhere.jsonl"], "nowhere.jsonl", "no such file or folder"),
        (["pairs.csv"], "pairs.csv", "the extension '.csv'"),
        (["empty.jsonl"], "empty.jsonl", "no rows"),
    ],
)
def test_data_that_is_not_there_is_named(
    world: TinyWorld, tmp_path: Path, run_dir: Path, train_files: list[str], place: str, found: str
) -> None:
    for name in ("pairs.csv", "empty.jsonl"):
        (tmp_path / name).write_text("")
    files = [str(tmp_path / name) for name in train_files]
    error = refused(train, values(world, run_dir, data={"train": files}), run_dir)
    assert error.place == (str(tmp_path / place) if train_files else place)
    assert error.found == found


def broken(folder: Path, what: str) -> tuple[str, str]:
    """Break a copy of a model folder; what the error says of it, and where."""
    if what == "nothing":
        shutil.rmtree(folder)
        return str(folder), "no such folder"
    if what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return str(folder), "no tokenizer.json"
    if what == "no weights":
        (folder / "model.safetensors").unlink()
        return str(folder), "neither model.safetensors nor model.safetensors.index.json"
    config = json.loads((folder / "config.json").read_text())
    if what == "no config":
        (folder / "config.json").unlink()
        return str(folder), "no config.json"
    if what == "another family":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
        return str(folder / "config.json"), "model_type = 'gemma3_text'"
    if what == "other sizes":
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
        return str(folder / "model.safetensors"), "model.layers.0.mlp.gate_proj.weight of shape (40, 24)"
    assert what == "a missing tensor"
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), "no tensor model.norm.weight"


@pytest.mark.parametrize(
    "what",
    ["nothing", "no tokenizer", "no config", "no weights", "another family", "other sizes", "a missing tensor"],
)
def test_a_folder_that_is_no_usable_model_is_named(world: TinyWorld, tmp_path: Path, run_dir: Path, what: str) -> None:
    folder = Path(shutil.copytree(world.student, tmp_path / "student"))
    place, found = broken(folder, what)
    error = refused(train, values(world, run_dir, model={"student": {"path": str(folder)}}), run_dir, may_log=True)
    assert (error.place, error.found) == (place, found)
    if what == "another family":
        assert error.expected == "one of the known families: llama, mistral, qwen2, qwen3, ministral"


def test_a_model_that_is_not_given_is_asked_for_by_key(world: TinyWorld, run_dir: Path) -> None:
    error = refused(train, values(world, run_dir, model={"student": {"path": None}}), run_dir)
    assert (error.place, error.found) == ("model.student.path", "nothing")


def test_a_vocabulary_that_does_not_fit_the_weights_is_named(world: TinyWorld, tmp_path: Path, run_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    side = {"path": str(world.student), "tokenizer": str(tmp_path / "grown")}
    error = refused(train, values(world, run_dir, model={"student": side}), run_dir, may_log=True)
    assert error.place == str(world.student)
    assert error.found == f"a tokenizer with ids up to {rows} and weights of {rows} rows"


def test_a_scored_model_with_another_vocabulary_is_named(world: TinyWorld, run_dir: Path) -> None:
    method = {"name": "score", "cache": str(run_dir / "cache"), "reference": str(world.student)}
    error = refused(score, values(world, run_dir, method=method), run_dir)
    assert error.place == str(world.student)
    assert "a tokenizer with ids up to" in error.found


@pytest.mark.parametrize("checkpoint", ["nowhere", "empty", None])
def test_a_checkpoint_that_is_none_is_named(world: TinyWorld, tmp_path: Path, checkpoint: str | None) -> None:
    (tmp_path / "empty").mkdir()
    given = str(tmp_path / checkpoint) if checkpoint else None
    with pytest.raises(InputError) as error:
        export(ExportConfig(given, str(world.student), str(tmp_path / "exported")))
    assert error.value.place == (given or "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_an_export_never_overwrites_a_folder(world: TinyWorld, tmp_path: Path) -> None:
    checkpoint = train(run_config(values(world, tmp_path / "run")))
    shutil.copytree(world.student, tmp_path / "precious")
    before = content(tmp_path / "precious")
    with pytest.raises(InputError, match="something already there"):
        export(ExportConfig(str(checkpoint), str(world.student), str(tmp_path / "precious")))
    assert content(tmp_path / "precious") == before
    # Nor does another run begin where there are checkpoints already.
    again = values(world, tmp_path / "run", trainer={"resume": False})
    assert "resume false" in refused(train, again, tmp_path / "run").found


# Values


@pytest.mark.parametrize(
    ("parallel", "found"),
    [
        ({"tensor": 2}, "tensor 2 x pipeline 1 x context 1 = 2 in a world of 3 processes"),
        ({"tensor": 2, "pipeline": 2}, "tensor 2 x pipeline 2 x context 1 = 4 in a world of 3 processes"),
    ],
    ids=["tensor", "both"],
)
def test_parallel_sizes_that_do_not_divide_the_world_are_named(
    world: TinyWorld, run_dir: Path, monkeypatch: pytest.MonkeyPatch, parallel: dict[str, int], found: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    method = {"name": "score", "cache": str(run_dir / "cache"), "reference": str(world.teacher)}
    for task, changed in ((train, {}), (score, {"method": method})):
        error = refused(task, values(world, run_dir, parallel=parallel, **changed), run_dir)
        assert (error.place, error.found) == ("parallel", found)


OVERLAPPED = {"tensor": 2, "sequence": True, "overlap_tensor": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what only machines without a GPU refuse")
@pytest.mark.parametrize(
    ("processes", "changed", "place", "found"),
    [
        (1, {"precision": {"dtype": "bf16", "fp8": "current"}}, "precision.fp8", "current on a machine without it"),
        (2, {"parallel": OVERLAPPED}, "parallel.overlap_tensor", "true without them"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_pairs_are_encoded(
    world: TinyWorld,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    changed: dict[str, Any],
    place: str,
    found: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    method = {"name": "score", "cache": str(run_dir / "cache"), "reference": str(world.teacher)}
    for task, other in ((train, {}), (score, {"method": method})):
        job = values(world, run_dir, data={"encoded": str(run_dir / "encoded")}, **changed, **other)
        error = refused(task, job, run_dir)
        assert (error.place, error.found) == (place, found)


@pytest.mark.parametrize(
    ("parallel", "place", "found"),
    [
        ({"pipeline": 3}, "parallel.pipeline", "3 chunks for a model of 2 layers"),
        ({"pipeline": 3, "virtual_pipeline": 2}, "parallel.pipeline", "6 chunks for a model of 2 layers"),
        ({"tensor": 3}, "parallel.tensor", "3 for a model of num_attention_heads"),
        ({"context": 3, "context_communication": "a2a"}, "parallel.context", "3 with "),
        ({"context": 3}, "data.microbatch_tokens", "256"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_divide_the_model_is_named_before_processes_meet(
    world: TinyWorld,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, Any],
    place: str,
    found: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    budget = 256 if place.startswith("data") else 264
    method = {"name": "score", "cache": str(run_dir / "cache"), "reference": str(world.teacher)}
    for task, other in ((train, {}), (score, {"method": method})):
        job = values(world, run_dir, parallel=parallel, data={"microbatch_tokens": budget}, **other)
        error = refused(task, job, run_dir)
        assert error.place == place
        assert error.found.startswith(found)


@pytest.mark.parametrize(
    ("override", "place", "found"),
    [
        ("+stages.ctpd.parallel.pipeline=3", "stage ctpd, parallel.pipeline", "3 chunks for a model of 2 layers"),
        ("+stages.score.parallel.pipeline=3", "stage score, parallel.pipeline", "3 chunks for a model of 2 layers"),
        ("+stages.ctpd.parallel.context=3", "stage ctpd, data.microbatch_tokens", "256"),
        ("+stages.score.method.microbatch_tokens=255", "stage score, method.microbatch_tokens", "255"),
    ],
)
def test_the_layout_of_a_last_stage_is_looked_at_before_the_first_begins(
    world: TinyWorld, run_dir: Path, monkeypatch: pytest.MonkeyPatch, override: str, place: str, found: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    before = content(run_dir)
    with pytest.raises(InputError) as error:
        run_pipeline(composed("pipeline", [*recipe(world, run_dir), override]))
    assert (error.value.place, error.value.found) == (place, found)
    assert content(run_dir) == before


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"data": {"max_lenght": 64}}, "data.max_lenght"),
        ({"policy": "judge"}, "policy"),
        ({"data": {"max_length": 1024, "microbatch_tokens": 4096}}, "data.max_length"),
        ({"data": {"on_bad": "ignore"}}, "data.on_bad"),
        ({"trainer": {"max_steps": 0}}, "trainer.max_steps"),
        ({"precision": {"dtype": "fp8"}}, "precision.dtype"),
        ({"model": {"student": {"chat_template": "{{ oops("}}}, "chat template"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_that_cannot_be_used_is_named(
    world: TinyWorld, run_dir: Path, changed: dict[str, Any], place: str
) -> None:
    error = refused(train, values(world, run_dir, **changed), run_dir, may_log=place == "data.max_length")
    assert place in error.place


def test_a_method_of_another_tool_is_named(world: TinyWorld, run_dir: Path) -> None:
    method = {"name": "score", "cache": str(run_dir / "cache"), "reference": str(world.teacher)}
    error = refused(train, values(world, run_dir, method=method), run_dir)
    assert (error.place, error.expected) == ("method.name", "one of " + ", ".join(METHODS))
    error = refused(score, values(world, run_dir), run_dir)
    assert (error.place, error.expected) == ("method.name", "score")


# The tools themselves


def test_a_tool_says_one_line_and_exits_with_status_2(world: TinyWorld, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(world.train.read_text() + "{broken\n")
    status, stdout, stderr = run_tool(
        "train.py",
        ["method=sft", "precision=fp32", f"model.student.path={world.student}", f"data.train=[{path}]"],
        tmp_path,
    )
    assert status == 2
    assert stdout == ""
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {path}:25: found malformed JSON")
    assert [item.name for item in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.slow
def test_of_two_processes_the_one_that_meets_the_bad_row_says_so(world: TinyWorld, tmp_path: Path) -> None:
    """A template that refuses one prompt: data-parallel ranks read other pairs, so one of them finds it alone."""
    template = AutoTokenizer.from_pretrained(world.student).chat_template
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + template
    (tmp_path / "template.jinja").write_text(refusing)
    path = edited(world, tmp_path, lambda rows: rows[9]["prompt"][0].update(content="no"))
    overrides = ["method=sft", "precision=fp32", "data.max_length=64", f"data.train=[{path}]", "run_dir=run"]
    model = [f"model.student.path={world.student}", "model.student.chat_template=template.jinja"]
    status, _, stderr = run_tool("train.py", [*overrides, *model], tmp_path, processes=2)
    assert status != 0
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert f"{path}:10" in line
    assert "not this" in line


def test_a_process_alone_tells_every_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several the first one speaks for all, see ``tests/faults/test_errors.py``."""
    initialize(ParallelConfig())
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            entry.stop(InputError("here", "this", "that"))
        assert stopped.value.code == 2
        assert capsys.readouterr().err == "error: here: found this; expected that\n"
