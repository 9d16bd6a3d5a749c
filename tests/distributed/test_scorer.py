"""The score cache holds the span sums of plain ``transformers``, whatever layout wrote it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.distributed import plain, plain_weights
from tests.distributed.conftest import Launches
from tests.distributed.jobs import LAYOUTS
from tests.distributed.world import TOLERANCE

# The folder of each role; what is left reads the student's tokens.
OF_TEACHER = {"reference": "teacher", "positive": "positive", "negative": "negative", "margin": "teacher"}
ROLES = OF_TEACHER | {name: name for name in ("student", "student_positive", "student_negative")}
SCORED = [
    pytest.param(name, marks=[pytest.mark.slow] if layout.slow else [])
    for name, layout in LAYOUTS.items()
    if "score" in layout.methods
]

Scores = dict[tuple[str, str, str], np.ndarray]


def read_cache(folder: Path) -> Scores:
    """(role, pair, response) -> scores of its spans, of the roles that are there."""
    return {
        (role, row["pair_id"], response): np.array(row[response], dtype=np.float64)
        for role in ROLES
        for file in sorted(folder.glob(f"{role}-*.parquet"))
        for row in pq.read_table(file).to_pylist()
        for response in ("chosen", "rejected")
    }


def _spans(home: Path, role: str, folder: str, row: dict[str, Any], name: str) -> np.ndarray:
    sides = [home / "student", home / "teacher"]
    reads = sides if role in OF_TEACHER else sides[::-1]
    of = plain_weights.margins if role == "margin" else plain.logprobs
    return plain.span_scores(home / folder, *reads, row, name, of).numpy()


@cache
def plain_scores(home: Path) -> Scores:
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    return {
        (role, row["id"], name): _spans(home, role, folder, row, name)
        for role, folder in ROLES.items()
        for row in rows
        for name in ("chosen", "rejected")
    }


def distance(found: Scores, expected: Scores) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key])) for key in expected)


@pytest.mark.parametrize("layout", SCORED)
def test_cache_holds_the_span_sums_of_plain_transformers(layout: str, launches: Launches) -> None:
    found = read_cache(launches.layout(layout) / "cache")
    assert distance(found, plain_scores(launches.home)) < TOLERANCE


@pytest.mark.parametrize("layout", SCORED)
def test_cache_of_any_layout_is_that_of_one_process(layout: str, launches: Launches) -> None:
    found = read_cache(launches.layout(layout) / "cache")
    # Each is off by rounding.
    assert distance(found, read_cache(launches.layout("one") / "cache")) < 2 * TOLERANCE


@pytest.mark.parametrize("layout", SCORED)
def test_manifest_does_not_depend_on_the_layout(layout: str, launches: Launches) -> None:
    manifests = [
        json.loads((launches.layout(name) / "cache" / "manifest.json").read_text()) for name in (layout, "one")
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0]["shards"] == 3, "data-parallel ranks that score an unequal number of shards"


def test_replicas_may_be_more_than_shards(launches: Launches) -> None:
    found = read_cache(launches.layout("dp2") / "cache-one-shard")
    expected = {
        key: scores
        for key, scores in read_cache(launches.home / "one" / "cache").items()
        if key[0] in ("positive", "negative")
    }
    assert distance(found, expected) < 2 * TOLERANCE


def test_spans_hold_several_tokens_of_either_side(launches: Launches) -> None:
    """What the numbers are worth: spans of one token on both sides would prove little."""
    home = launches.home
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    sides = [[plain.tokens(home / side, row, "chosen") for side in ("student", "teacher")] for row in rows]
    spans = sum(len(plain.shared_ends(*pair)) for pair in sides)
    assert all(sum(len(pair[side].response) for pair in sides) > 1.2 * spans for side in (0, 1))
    assert torch.tensor([len(pair[0].response) != len(pair[1].response) for pair in sides]).any()
