"""Whether what a score cache holds can be used at all, found out before anything is trained on it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError

_RESPONSES = ("chosen", "rejected")


def check_tables(
    folders: Mapping[str, Path], tables: Mapping[str, pa.Table], rows: Mapping[str, Mapping[str, int]]
) -> None:
    """Compare the scores of all roles of a run.

    Args:
        folders: The cache that each role is from.
        tables: Of each role: ``pair_id``, and ``chosen`` and ``rejected`` with a list of scores each.
        rows: Of each role: pair id to its row.

    Raises:
        InputError: A pair that is there twice, or for one role only; a score that is not finite; a response of other
            spans for one role than for another.
    """
    first = next(iter(tables))
    for role, table in tables.items():
        place = f"{folders[role]}, {role}"
        if len(rows[role]) < len(table):
            twice = _repeated(table["pair_id"])
            raise InputError(place, f"pair {twice!r} twice", "scores of each pair once")
        for pair_id in rows[first].keys() ^ rows[role].keys():
            lacking = role if pair_id in rows[first] else first
            raise InputError(
                f"{folders[lacking]}, {lacking}", f"no pair {pair_id!r}", "scores of every pair of the data"
            )
        order = np.array([rows[role][pair_id] for pair_id in rows[first]])
        for name in _RESPONSES:
            _check_finite(place, table, name)
            spans, expected = _spans(table, name)[order], _spans(tables[first], name)
            if (spans != expected).any():
                at = int(np.flatnonzero(spans != expected)[0])
                pair = f"{place}, pair {tables[first]['pair_id'][at].as_py()!r}, {name}"
                raise InputError(pair, f"{spans[at]} spans", f"{expected[at]}, as the {first} has")


def _spans(table: pa.Table, name: str) -> NDArray[np.int64]:
    return pc.list_value_length(table[name]).to_numpy().astype(np.int64)


def _check_finite(place: str, table: pa.Table, name: str) -> None:
    # A null among the scores becomes NaN.
    scores = pc.list_flatten(table[name]).to_numpy().astype(np.float32)
    if np.isfinite(scores).all():
        return
    at = int(np.flatnonzero(~np.isfinite(scores))[0])
    ends = np.cumsum(_spans(table, name))
    row = int(np.searchsorted(ends, at, side="right"))
    span = at - int(ends[row - 1] if row else 0)
    pair = f"{place}, pair {table['pair_id'][row].as_py()!r}, {name}, span {span}"
    raise InputError(pair, str(scores[at]), "a finite score")


def _repeated(ids: pa.ChunkedArray) -> object:
    counts = pc.value_counts(ids.combine_chunks())
    return next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
