"""One dataset, encoded in three ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.templates import Side
from tests.data.encoded.writing import N_PAIRS, write


@pytest.fixture(scope="package")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    make_pairs: Callable[..., list[PreferencePair]],
    as_row: Callable[[PreferencePair], dict[str, Any]],
) -> PreferenceDataset:
    rows = [as_row(pair) for pair in make_pairs(N_PAIRS)]
    # One that no truncation can fit, one that is truncated; a whole shard of pairs that are skipped.
    rows[3]["prompt"][-1]["content"] = "the sea " * 400
    rows[4]["chosen"][0]["content"] = "日本 🙂 the sea " * 60
    for row in rows[10:15]:
        row["prompt"][-1]["content"] = "the sea " * 400
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_preferences(path)


@pytest.fixture(scope="package")
def encoders(unigram_side: Side, bpe_side: Side) -> dict[str, PairEncoder]:
    spaced = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return {
        "two sides": PairEncoder(unigram_side, bpe_side, include_eos=True, max_length=128),
        "one side": PairEncoder(bpe_side, None, include_eos=False, max_length=128),
        "other template": PairEncoder(
            bpe_side,
            Side(bpe_side.tokenizer, spaced),
            include_eos=True,
            max_length=128,
        ),
    }


@pytest.fixture(scope="package")
def folders(
    tmp_path_factory: pytest.TempPathFactory, dataset: PreferenceDataset, encoders: dict[str, PairEncoder]
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoded")
    return {name: write(home / name, dataset, encoder).folder for name, encoder in encoders.items()}
