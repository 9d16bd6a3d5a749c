"""Parquet files of a few hundred bytes that say one long value in every row, and what tables are counted as."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.errors import InputError
from ctpd_nemo.parquet_size import _bytes, check_size, values_once

# Two billion bytes, were it written out.
ROWS, LONG = 2000, "x " * 500_000


def said_in_every_row(value: Any) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array([value]))


def in_lists(**fields: pa.Array) -> pa.Array:
    objects = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    return pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), objects)


def write(path: Path, **columns: Any) -> Path:
    whole = {"prompt": "a", "chosen": "b", "rejected": "c"}
    table = pa.table({name: said_in_every_row(value) for name, value in whole.items()} | columns)
    # Without Arrow's own schema they are read as text.
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=ROWS)
    assert path.stat().st_size < 10_000
    return path


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """What Arrow takes from now on."""
    before = pa.default_memory_pool()
    own = pa.proxy_memory_pool(before)
    pa.set_memory_pool(own)
    yield own
    pa.set_memory_pool(before)


LARGE: dict[str, Callable[[], dict[str, pa.Array]]] = {
    "text": lambda: {"chosen": said_in_every_row(LONG)},
    "messages": lambda: {"prompt": in_lists(role=said_in_every_row("user"), content=said_in_every_row(LONG))},
    "a column that templates read": lambda: {"documents": said_in_every_row(LONG)},
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_value_that_every_row_says_is_not_written_out(
    kind: str, on_bad: str, tmp_path: Path, pool: pa.MemoryPool
) -> None:
    path = write(tmp_path / "pairs.parquet", **LARGE[kind]())
    with pytest.raises(InputError, match=r"pairs\.parquet: found more than 67,108,864 bytes in a file of [\d,]{3,5};"):
        open_preferences([str(path)], on_bad=on_bad)
    assert pool.max_memory() < 2**27


def test_pictures_that_are_said_to_be_in_every_row_are_not_written_out(tmp_path: Path, pool: pa.MemoryPool) -> None:
    path = write(tmp_path / "pairs.parquet", images=in_lists(bytes=said_in_every_row(LONG.encode())))
    pairs = open_preferences([str(path)])
    assert len(pairs) == ROWS
    assert pairs[7].fields == {"images": True}
    assert pool.max_memory() < 2**27


def test_what_a_file_says_that_it_unpacks_to_is_believed_where_it_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    table = pa.table({"prompt": [" " * 2**20] * 70})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(InputError, match="more than 67,108,864 bytes"):
        check_size(path, ["prompt"])


_TEXTS = [f"text {number}" for number in range(1000)]
COLUMNS: dict[str, Any] = {
    "text": [*_TEXTS, None],
    "large text": pa.array(_TEXTS, pa.large_string()),
    "text as views": pa.array(_TEXTS, pa.string_view()),
    "bytes": [text.encode() for text in _TEXTS],
    "bytes of one length": pa.array([b"ab"] * 1000, pa.binary(2)),
    "numbers": range(1000),
    "numbers with a point": pa.array(range(1000), pa.float64()),
    "numbers of half precision": pa.array(range(1000), pa.float32()).cast(pa.float16()),
    "decimals": pa.array(range(1000), pa.decimal128(5, 2)),
    "times": pa.array(range(1000), pa.timestamp("ns")),
    "messages": [[{"role": "user", "content": text}] for text in _TEXTS],
    "messages, some rows without": [[{"role": "user", "content": text}] if len(text) > 6 else None for text in _TEXTS],
    "large lists": pa.array([[text] for text in _TEXTS], pa.large_list(pa.string())),
    "lists of one length": pa.array([[text, text] for text in _TEXTS], pa.list_(pa.string(), 2)),
    "maps": pa.array([[(text, text)] for text in _TEXTS], pa.map_(pa.string(), pa.string())),
    "calls in messages": [[{"calls": [{"name": text, "arguments": [text]}]}] for text in _TEXTS],
    "floats in lists": pa.array([[1.5, 2.5]] * 1000, pa.list_(pa.float32())),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_is_counted_as_arrow_holds_it(kind: str, tmp_path: Path) -> None:
    """Within a factor of two: what it holds beside its values depends on how it was made."""
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"prompt": pa.array(COLUMNS[kind]), "other": ["x"] * len(COLUMNS[kind])}), path)
    counted = sum(_bytes(batch.column(0)) for batch in values_once(path, ["prompt"]))
    held = pq.read_table(path, columns=["prompt"]).nbytes
    assert held / 2 <= counted <= 2 * held
    check_size(path, ["prompt"])


@pytest.mark.parametrize("limit", [10, 1000, 10**6])
@pytest.mark.parametrize("group", [7, 100, 10**6])
def test_every_row_is_seen_once_whatever_a_writer_does_with_values(limit: int, group: int, tmp_path: Path) -> None:
    """It keeps each value once, and goes on without that where there are too many, in the midst of a column."""
    path = tmp_path / "pairs.parquet"
    table = pa.table(
        {
            "prompt": [[{"role": "user", "content": f"{number % 300} {'x' * 20}"}] for number in range(1000)],
            "images": [[{"bytes": b"%d" % (number % 300)}] if number % 3 else None for number in range(1000)],
            "chosen": [f"{number}" for number in range(1000)],
        }
    )
    pq.write_table(table, path, dictionary_pagesize_limit=limit, data_page_size=limit, row_group_size=group)
    for name in table.column_names:
        batches = list(values_once(path, [name]))
        assert [value for batch in batches for value in batch.column(0).to_pylist()] == table[name].to_pylist()
