"""What an evaluation lacks is told before a model is loaded; with nothing to do it is no success."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpd_nemo import output_paths
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation import harness
from ctpd_nemo.evaluation.evaluate import EvaluateConfig, PairsConfig, TasksConfig, evaluate
from ctpd_nemo.evaluation.model import chosen_device
from ctpd_nemo.evaluation.preferences import evaluate_folder
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("first") / "world")


@pytest.fixture
def folder(world: TinyWorld, tmp_path: Path) -> Path:
    """An export of one's own."""
    return Path(shutil.copytree(world.student, tmp_path / "export"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that loads a model has gone too far."""
    for place in ("preferences", "harness"):
        monkeypatch.setattr(f"ctpd_nemo.evaluation.{place}.load_model", lambda *_: pytest.fail("a model is loaded"))


@pytest.mark.parametrize("names", [[], None])
def test_an_evaluation_with_nothing_to_do_is_an_error_that_says_what_to_give(
    names: list[str] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pairs and without names of tasks, or where there is no task at all."""
    if names is None:
        monkeypatch.setattr("ctpd_nemo.evaluation.evaluate.known_tasks", list)
    with pytest.raises(InputError) as error:
        evaluate(EvaluateConfig(str(folder), TasksConfig(names=names)))
    assert error.value.place == "pairs.file, tasks.names"
    assert "pairs.file=PAIRS" in error.value.expected
    assert "tasks.names=" in error.value.expected
    assert not (folder / "evaluation.json").exists()


def _damaged_record(folder: Path) -> None:
    (folder / "ctpd_nemo.json").write_text('{"config": []}')


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _kernel(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))


# Of an evaluation on pairs first, and then on tasks: what is found out last where nobody looks first.
LACKS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "a task": ({"tasks": TasksConfig(["humaneval"])}, r"tasks\.names: found 'humaneval'", None),
    "examples": ({"tasks": TasksConfig(["gsm8k"], num_fewshot=-1)}, r"tasks\.num_fewshot: found -1", None),
    "a device": ({"device": "cuda:77"}, r"device: found 'cuda:77'", None),
    "a dtype": ({"dtype": "int8"}, "dtype: found 'int8'", None),
    "a record": ({}, r"ctpd_nemo\.json, config: found \[\]", _damaged_record),
    "weights": ({}, "export: found no model", _no_weights),
    "code of its own": ({}, "attn_implementation: found 'somebody/kernel'", _kernel),
    "the reference's folder": ({"reference": "nowhere"}, r"nowhere/config\.json: found no such file", None),
    "the pairs": ({"file": "no.jsonl"}, r"no\.jsonl: found no such file", None),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_an_evaluation_lacks_is_told_before_a_model_is_loaded(
    what: str, world: TinyWorld, folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_harness", lambda: None)
    changes, message, damage = LACKS[what]
    if damage is not None:
        damage(folder)
    pairs = PairsConfig(file=changes.get("file", str(world.test)), reference=changes.get("reference"))
    more = {key: value for key, value in changes.items() if key not in ("file", "reference")}
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(str(folder), **{"tasks": TasksConfig([]), "pairs": pairs, **more}))
    assert not (folder / "evaluation.json").exists()


def test_without_the_harness_pairs_are_not_begun(
    world: TinyWorld, folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"tasks: found no harness .*pip install 'ctpd-nemo\[eval\]', or"):
        evaluate(EvaluateConfig(str(folder), TasksConfig(["gsm8k"]), PairsConfig(str(world.test))))


def test_rows_and_datasets_that_are_out_of_reach_are_told_before_a_model_is_loaded(
    world: TinyWorld, folder: Path, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub")

    with pytest.raises(InputError, match=r"hellaswag\.jsonl: found no such file"):
        evaluate(EvaluateConfig(str(folder), TasksConfig(["hellaswag"], str(tmp_path)), PairsConfig(str(world.test))))
    monkeypatch.setattr(tasks, "get_task_dict", unreachable)
    with pytest.raises(InputError, match=r"tasks\.data: found null, and no data of hellaswag \(Couldn't reach 'R"):
        evaluate(EvaluateConfig(str(folder), TasksConfig(["hellaswag"]), PairsConfig(str(world.test))))


def test_a_folder_that_cannot_keep_results_is_told_before_a_model_is_loaded(
    world: TinyWorld, folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_paths.os, "access", lambda *_, **__: False)
    with pytest.raises(InputError, match=r"^folder: found .*without permission to write in"):
        evaluate(EvaluateConfig(str(folder), TasksConfig([]), PairsConfig(str(world.test))))


@pytest.mark.parametrize(
    ("given", "gpu", "chosen"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        (None, True, "cuda"),
        (None, False, "cpu"),
        ("cpu", True, "cpu"),
        ("cuda:1", True, "cuda:1"),
        ("cuda", False, "cuda"),
    ],
)
def test_the_device_is_a_gpu_where_there_is_one_unless_it_is_said(
    given: str | None, gpu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert chosen_device(given) == chosen


def test_evaluations_take_what_there_is_by_default(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of the quickstart, which has no key for it."""
    devices: list[str] = []
    monkeypatch.setattr("ctpd_nemo.evaluation.model.chosen_device", lambda given: devices.append(given) or "cpu")
    evaluate_folder(world.student, world.test, max_new_tokens=1, limit=1, generations=1)
    assert devices == ["auto"]
    assert EvaluateConfig().device == "auto"
