"""Bad input stops a job with one clear error, and nothing that was there is lost."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.pipeline import entry, quiet
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import small_world
from tests.pipeline.tool import run_tool

Rows = list[dict[str, Any]]
Job = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture(scope="module")
def cache(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of every role by the untrained teacher, ready for CTPD."""
    home = tmp_path_factory.mktemp("scored")
    roles = dict.fromkeys(("reference", "positive", "negative"), str(world.teacher))
    config = values(world, home / "run", method={"name": "score", "cache": str(home / "cache"), **roles})
    return score(run_config(config))


def values(world: TinyWorld, run_dir: Path, **changed: Any) -> DictConfig:
    """A valid job, SFT of the student in three steps, with some of its values changed."""
    job = {
        "method": {"name": "sft"},
        "run_dir": str(run_dir),
        "model": {"student": {"path": str(world.student)}, "teacher": {"path": str(world.teacher)}},
        "data": {
            "train": [str(world.train)],
            "max_length": 64,
            "microbatch_tokens": 256,
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "precision": {"dtype": "fp32"},
    }
    method = changed.pop("method", job["method"])
    merged = OmegaConf.merge(job, changed)
    assert isinstance(merged, DictConfig)
    merged.method = method
    return merged


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder that somebody cares about."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    (folder / "export").mkdir()
    for name in ("checkpoints/step-00000007/half", "export/model.safetensors", "metrics.jsonl", "config.json", "notes"):
        (folder / name).write_text(f'{{"precious": "{name}"}}\n')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(task: Callable[[Any], Any], config: DictConfig, run_dir: Path, may_log: bool = False) -> InputError:
    """The error that a job ends with, once it is sure that it is one line and that nothing was touched.

    ``may_log``: the job had begun to log when it found out.
    """
    before = content(run_dir)
    with pytest.raises(InputError) as error:
        task(run_config(config))
    after = content(run_dir)
    if may_log:
        after = {name: data for name, data in after.items() if not name.startswith("logs/")}
    assert after == before
    assert "\n" not in str(error.value)
    return error.value


def edited(world: TinyWorld, folder: Path, edit: Callable[[Rows], None]) -> Path:
    """The training pairs with something done to them."""
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    edit(rows)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    assert any(line.endswith("scored 23 pairs, 1 skipped (too_long 1), 0 responses truncated") for line in said)
    assert any(line.endswith("trained on 23 pairs, 1 skipped (too_long 1), 0 responses truncated") for line in said)
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
        assert error.expected == "one of the known families: llama, mistral, qwen2, qwen3"


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


# The score cache


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"data": {"max_length": 48}}, "truncation"),
        ({"data": {"include_eos": False}}, "truncation"),
        ({"precision": {"dtype": "bf16"}}, "precision"),
        (
            {"model": {"student": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}},
            "student_template",
        ),
        (
            {"model": {"teacher": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}},
            "teacher_template",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_that_belongs_to_another_run_is_refused_with_what_differs(
    world: TinyWorld, cache: Path, run_dir: Path, changed: dict[str, Any], field: str
) -> None:
    before = content(cache)
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, **changed)
    error = refused(train, config, run_dir)
    assert error.place == f"{cache}/manifest.json, {field}"
    assert error.found != error.expected
    assert content(cache) == before


def test_a_cache_of_other_pairs_is_refused(world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path) -> None:
    path = edited(world, tmp_path, lambda rows: rows.pop())
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, data={"train": [str(path)]})
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, data"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_cache_of_another_tokenizer_is_refused(
    world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path, side: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(getattr(world, side))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    model = {side: {"tokenizer": str(tmp_path / "grown")}}
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, model=model)
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, {side}_tokenizer"


def test_a_cache_of_another_teacher_is_refused(world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path) -> None:
    folder = Path(shutil.copytree(world.teacher, tmp_path / "teacher"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"name": "ctpd", "scores": str(cache)}
    config = values(world, run_dir, method=method, model={"teacher": {"path": str(folder)}})
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, teacher_weights.reference"
    for role in ("positive", "negative"):
        config = values(world, run_dir, method={**method, role: str(folder)})
        assert refused(train, config, run_dir).place == f"{cache}/manifest.json, teacher_weights.{role}"


def test_the_cache_is_all_that_is_left_of_the_teacher_but_its_tokenizer(
    world: TinyWorld, cache: Path, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(tmp_path / "tokenizer")
    model = {"teacher": {"path": None, "tokenizer": str(tmp_path / "tokenizer")}}
    method = {"name": "ctpd", "scores": str(cache)}
    assert train(run_config(values(world, tmp_path / "run", method=method, model=model))).is_dir()


def test_a_pair_that_the_cache_does_not_hold_is_named(world: TinyWorld, cache: Path, tmp_path: Path) -> None:
    """Found when the pair's turn comes."""
    holed = Path(shutil.copytree(cache, tmp_path / "cache"))
    (shard,) = holed.glob("negative-*.parquet")
    table = pq.read_table(shard)
    pq.write_table(table.slice(0, len(table) - 1), shard)
    config = values(world, tmp_path / "run", method={"name": "ctpd", "scores": str(holed)})
    missing = table["pair_id"][-1].as_py()
    with pytest.raises(InputError, match=rf"{holed}, negative: found no pair '{missing}'"):
        train(run_config(config))


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
    assert (error.place, error.expected) == ("method.name", "one of sft, dpo, ctpd")
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


def test_the_first_process_to_stop_speaks_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    initialize(ParallelConfig())
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            entry.stop(InputError("here", "this", "that"))
        assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: here: found this; expected that\n"
