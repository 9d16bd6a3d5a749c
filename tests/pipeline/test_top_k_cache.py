"""The cache of the teacher's largest log-probs: what is no log-prob is never written, and never read."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.score_cache import FINGERPRINTS
from ctpd_nemo.pipeline.score_sums import with_sums
from ctpd_nemo.pipeline.top_k_cache import PairTopK, TopKReader, TopKWriter

PRINTS = {name: f"print of {name}" for name in FINGERPRINTS}
K, TOKENS = 2, 3


def pair(name: str, logprob: float = -1.0, tail: float = 0.25) -> PairTopK:
    """The last token's numbers are given."""
    logprobs = np.full((TOKENS, K), -1.0, np.float32)
    tails = np.full(TOKENS, 0.25, np.float32)
    logprobs[-1, -1], tails[-1] = logprob, tail
    return PairTopK(name, logprobs, np.zeros((TOKENS, K), np.int32), tails)


@pytest.fixture(params=["float16", "float32"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> TopKWriter:
    writer = TopKWriter(tmp_path, PRINTS, "weights", n_pairs=2, pairs_per_shard=2, k=K, dtype=request.param)
    writer.begin()
    return writer


BAD: dict[str, tuple[dict[str, float], str]] = {
    "nan": ({"logprob": math.nan}, "logprobs, 5: found nan"),
    "minus infinity": ({"logprob": -math.inf}, "logprobs, 5: found -inf"),
    # A number of its own in float32, and none in float16.
    "beyond half precision": ({"logprob": -1e6}, "logprobs, 5: found -inf"),
    "above zero": ({"logprob": 0.5}, "logprobs, 5: found 0.5"),
    "a tail that is nan": ({"tail": math.nan}, "tail, 2: found nan"),
    "a tail below zero": ({"tail": -0.5}, "tail, 2: found -0.5"),
    "a tail above one": ({"tail": 1.5}, "tail, 2: found 1.5"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_log_prob_is_never_written(name: str, cache: TopKWriter) -> None:
    values, said = BAD[name]
    pairs = [pair("a"), pair("b", **values)]
    if name == "beyond half precision" and cache._type == pa.float32():
        cache.write(0, pairs)
        return
    with pytest.raises(InputError, match=f"top_k-00000.parquet, pair 'b', {said}"):
        cache.write(0, pairs)
    assert [path.name for path in cache.folder.iterdir()] == ["top_k.json"]


def changed(table: pa.Table, column: str, change: Callable[[list[list[Any]]], Any]) -> pa.Table:
    rows = table[column].to_pylist()
    change(rows)
    number = table.schema.get_field_index(column)
    return table.set_column(number, column, pa.array(rows, table.schema.field(column).type))


@pytest.mark.parametrize("column", ["logprobs", "tail"])
def test_what_was_not_written_is_never_read(column: str, cache: TopKWriter) -> None:
    cache.write(0, [pair("a"), pair("b")])
    path = cache.folder / "top_k-00000.parquet"
    table = pq.read_table(path)
    # A value that could be one, and an end that is elsewhere.
    for change in (lambda rows: rows[0].__setitem__(0, rows[0][0] / 2), lambda rows: rows[1].insert(0, rows[0].pop())):
        pq.write_table(changed(table, column, change), path)
        with pytest.raises(InputError, match=f"top_k-00000.parquet, {column}: found .*checksum differs"):
            TopKReader(cache.folder, PRINTS, "weights")
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(InputError, match=r"top_k-00000.parquet: found no checksums"):
        TopKReader(cache.folder, PRINTS, "weights")


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("logprobs", lambda rows: rows[0].__setitem__(1, math.nan), "pair 'a', logprobs, 1: found nan"),
        ("logprobs", lambda rows: rows[1].__setitem__(0, math.inf), "pair 'b', logprobs, 0: found inf"),
        ("logprobs", lambda rows: rows[1].__setitem__(0, None), "pair 'b', logprobs, 0: found nan"),
        ("tail", lambda rows: rows[1].__setitem__(2, -math.inf), "pair 'b', tail, 2: found -inf"),
    ],
    ids=["nan", "inf", "null", "tail"],
)
def test_what_is_no_log_prob_is_never_read(
    column: str, change: Callable[[list[list[Any]]], Any], said: str, cache: TopKWriter
) -> None:
    cache.write(0, [pair("a"), pair("b")])
    assert TopKReader(cache.folder, PRINTS, "weights").lookup("b")[0].shape == (TOKENS, K)
    path = cache.folder / "top_k-00000.parquet"
    pq.write_table(with_sums(changed(pq.read_table(path), column, change)), path)
    with pytest.raises(InputError, match=f"top_k-00000.parquet, {said}"):
        TopKReader(cache.folder, PRINTS, "weights")
