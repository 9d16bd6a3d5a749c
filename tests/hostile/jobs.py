"""Run folders and folders to evaluate that hold something else, and stages that are none."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.hostile.case import Case, Scene, Values
from tests.hostile.rows import GOOD

Edit = Callable[[Path], object]


def _run(folder: Path) -> Path:
    """A run folder, as a job leaves it."""
    (folder / "run").mkdir()
    for name, content in {"config.json": {}, "stage.json": {}, "origin.json": {}}.items():
        (folder / "run" / name).write_text(json.dumps(content))
    return folder / "run"


def _exported(name: str, found: str, expected: str, place: str, content: str) -> Case:
    """The config of a run, where its checkpoint is exported from."""

    def make(scene: Scene) -> Values:
        checkpoint = scene.folder / "run" / "checkpoints" / scene.checkpoint.name
        shutil.copytree(scene.checkpoint, checkpoint)
        (scene.folder / "run" / "config.json").write_text(content)
        exported = {"reference": str(scene.world.student), "folder": str(scene.folder / "export")}
        return {"checkpoint": str(checkpoint), **exported}

    return Case(name, "run folder", make, place, found, expected, tool="export_hf")


def _given(tool: str, border: str, name: str, values: Values, *rest: str) -> Case:
    return Case(name, border, lambda scene: values, *rest, tool=tool)


def _exports() -> list[Case]:
    of_student = lambda scene: {"reference": str(scene.world.student), "checkpoint": str(scene.checkpoint)}  # noqa: E731
    return [
        _exported("a config that is no JSON", "no JSON", "the config of a run", "config.json", "{"),
        _exported("a config that is a list", "a JSON list", "the config of a run", "config.json", "[]"),
        _exported("a method that is text", "'sft'", "keys and their values", "method.name", '{"method": "sft"}'),
        _exported("a policy that is a list", "['a']", "policy and model", "config.json", '{"policy": ["a"]}'),
        _exported(
            "a teacher that is a number", "7", "a string", "model.teacher.path", '{"model": {"teacher": {"path": 7}}}'
        ),
        Case(
            "an export over a model",
            "run folder",
            lambda scene: {**of_student(scene), "folder": str(scene.world.teacher)},
            "teacher",
            "something already there",
            "a folder that does not exist yet",
            tool="export_hf",
        ),
        Case(
            "an export of one's own folder",
            "run folder",
            lambda scene: {**of_student(scene), "folder": ".."},
            "folder",
            "'..'",
            "a name of its own",
            tool="export_hf",
        ),
        _given("export_hf", "run folder", "no checkpoint", {"folder": "x"}, "checkpoint", "nothing", "a folder"),
        _given(
            "export_hf",
            "run folder",
            "no such checkpoint",
            {"checkpoint": "nowhere", "reference": "x", "folder": "y"},
            "nowhere",
            "nothing",
            "a checkpoint folder",
        ),
        _given("report", "run folder", "no run to report", {"run_dir": "nowhere"}, "run_dir", "", ""),
        _given("report", "run folder", "an empty name", {"run_dir": ""}, "run_dir", "", ""),
        _given("report", "run folder", "a key of a report", {"run_folder": "x"}, "run_folder", "not known", "run_dir"),
    ]


def _model(edit: Edit) -> Callable[[Scene], Values]:
    """An exported folder with something done to it, evaluated on one pair."""

    def make(scene: Scene) -> Values:
        folder = Path(shutil.copytree(scene.world.student, scene.folder / "export"))
        edit(folder)
        (scene.folder / "pairs.jsonl").write_text(json.dumps(GOOD) + "\n")
        return {
            "folder": str(folder),
            "tasks": {"names": []},
            "pairs": {"file": str(scene.folder / "pairs.jsonl"), "max_length": 128, "generations": 1},
        }

    return make


def _written(name: str, content: Any) -> Edit:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def _config(**changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))

    return edit


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _code(folder: Path) -> None:
    """A family whose classes are code of the folder, and nothing else."""
    (folder / "evil.py").write_text("open('evil-was-here', 'w')\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    _config(model_type="evil", auto_map=auto_map, architectures=["Evil"])(folder)


EVALUATIONS: dict[str, tuple[Edit, str, str, str]] = {
    "weights that are a pickle": (_pickled, "export", "no model", "a Hugging Face folder of a causal model"),
    "code in the folder": (_code, "export", "", ""),
    "a kernel of a repository": (
        _config(attn_implementation="evil/kernels"),
        "config.json, attn_implementation",
        "'evil/kernels'",
        "transformers' own",
    ),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "export", "", ""),
    "an earlier evaluation that is a list": (_written("evaluation.json", []), "evaluation.json", "a JSON list", ""),
    "an evaluation that is a pickle": (
        lambda folder: (folder / "evaluation.json").write_bytes(pickle.dumps({})),
        "evaluation.json",
        "no JSON",
        "",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "export", "no tokenizer.json", ""),
}
# Rows of benchmarks: the task, a line, what is found.
ROWS: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("gsm8k", b"{", "JSONDecodeError"),
    "a list": ("gsm8k", b"[]", "TypeError"),
    "no UTF-8": ("gsm8k", b'{"question": "\xe9"}', "UnicodeDecodeError"),
    "lists without end": ("gsm8k", b"[" * 100_000, "RecursionError"),
    "no answer": ("gsm8k", b'{"question": "a"}', "KeyError('answer')"),
    "an answer without its mark": ("gsm8k", b'{"question": "a", "answer": "7"}', "an answer without '#### '"),
    "no gap": ("winogrande", b'{"sentence": "a", "option1": "a", "option2": "b", "answer": "1"}', "0 gaps"),
    "a label beyond": ("hellaswag", b'{"ctx": "a: b", "endings": ["a"], "label": 9}', "label 9 of 1 choices"),
}


def _rows(task: str, line: bytes) -> Callable[[Scene], Values]:
    def make(scene: Scene) -> Values:
        (scene.folder / f"{task}.jsonl").write_bytes(line + b"\n")
        return {"folder": str(scene.world.student), "tasks": {"names": [task], "data": str(scene.folder)}}

    return make


def _evaluations() -> list[Case]:
    def given(name: str, values: Values, *rest: str) -> Case:
        return _given("evaluate", "evaluation", name, values, *rest)

    folders = (
        Case(name, "evaluation", _model(edit), *rest, tool="evaluate") for name, (edit, *rest) in EVALUATIONS.items()
    )
    return [
        *folders,
        given("no folder", {}, "folder", "None", "an exported Hugging Face folder"),
        given("no such folder", {"folder": "nowhere"}, "folder", "'nowhere'", "an exported Hugging Face folder"),
        given("a key", {"foldr": "x"}, "foldr", "a key that is not known", "'folder'?"),
    ]


def _benchmarks() -> list[Case]:
    return [
        Case(
            f"a row with {name}",
            "evaluation",
            _rows(task, line),
            f"{task}.jsonl:1",
            found,
            f"a row of {task}",
            "evaluate",
        )
        for name, (task, line, found) in ROWS.items()
    ]


def _spans() -> list[Case]:
    def given(name: str, values: Values, *rest: str) -> Case:
        return _given("inspect_spans", "config", name, values, *rest)

    return [
        given("one tokenizer", {"tokenizers": ["a"], "text": "x"}, "tokenizers", "1 folders", "two or more"),
        given("nothing to show", {"tokenizers": ["a", "b"]}, "text, file, data.train", "nothing", "one of the three"),
        given("a limit of no pairs", {"tokenizers": ["a", "b"], "text": "x", "limit": 0}, "limit", "0", "1 or more"),
        given("no such tokenizer", {"tokenizers": ["none", "b"], "text": "x"}, "none", "no such folder", "fast token"),
    ]


def job_cases(harness: bool) -> list[Case]:
    """``harness``: whether the benchmarks can be run here."""
    return [*_exports(), *_evaluations(), *(_benchmarks() if harness else []), *_spans()]
