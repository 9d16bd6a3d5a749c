"""The same as processes of their own: a sample of the corpus from the command line."""

from pathlib import Path
from typing import Any

import pytest

from tests.hostile.case import Scene
from tests.hostile.corpus import CASES
from tests.pipeline.tool import run_tool

# One of each border whose cases are a run of tools/train.py.
SAMPLE = [
    ("rows", "a surrogate in chosen"),
    ("files", "gzip that is cut"),
    ("tokenizer", "code in the folder"),
    ("template", "the modules of a macro"),
    ("model config", "a billion layers"),
    ("weights", "a shard in the folder above"),
    ("score cache", "a score that is no number"),
    ("encoded dataset", "objects in an array"),
]
QUICK = ("weights",)


def overrides(values: dict[str, Any], key: str = "") -> list[str]:
    """Nested values as Hydra's command line has them, quoted so that nothing in them is read."""
    if isinstance(values, dict):
        return [line for name, value in values.items() for line in overrides(value, f"{key}.{name}" if key else name)]
    if isinstance(values, list):
        return [f"{key}=[{','.join(map(_quoted, values))}]"]
    return [f"{key}={_quoted(values)}"]


def _quoted(value: Any) -> str:
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'" if isinstance(value, str) else str(value)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.border.replace(" ", "_"), marks=() if case.border in QUICK else pytest.mark.slow)
        for case in CASES
        if (case.border, case.name) in SAMPLE
    ],
)
def test_a_tool_says_one_line_and_exits_with_status_2(case: Any, scene: Scene, elsewhere: Path) -> None:
    values = case.build(scene)
    method = values.pop("method", {"name": "sft"})
    world = scene.world
    job = {
        "model": {"student": {"path": str(world.student)}, "teacher": {"path": str(world.teacher)}},
        "data": {"train": [str(world.train)], "max_length": 64, "microbatch_tokens": 256, "num_workers": 0},
    }
    for group, given in values.items():
        for name, value in given.items():
            job[group][name] = {**job[group].get(name, {}), **value} if isinstance(value, dict) else value
    name = method.pop("name")
    arguments = [f"method={name}", "precision=fp32", *overrides(job), *overrides({"method": method})]
    status, stdout, stderr = run_tool("train.py", arguments, elsewhere)
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert case.place in line
    assert case.found in line
    assert list(elsewhere.iterdir()) == []


def test_the_sample_is_of_the_corpus() -> None:
    assert {(case.border, case.name) for case in CASES} >= set(SAMPLE)
