"""Whether scores can be used at all, found out before they are written, and before anything is trained on them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError

_RESPONSES = ("chosen", "rejected")
# What rounding can make of the log-prob of a span that is certain, in nats; it is summed over tokens in fp32.
ROUNDING = 0.01


def check_tables(
    folders: Mapping[str, Path], tables: Mapping[str, pa.Table], rows: Mapping[str, Mapping[str, int]]
) -> None:
    """Compare the scores of all roles of a run.

    Args:
        folders: The cache that each role is from.
        tables: Of each role: ``pair_id``, and ``chosen`` and ``rejected`` with a list of scores each.
        rows: Of each role: pair id to its row.

    Raises:
        InputError: A pair that is there twice, or for one role only; a response of other spans for one role than for
            another.
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
            spans, expected = _spans(table, name)[order], _spans(tables[first], name)
            if (spans != expected).any():
                at = int(np.flatnonzero(spans != expected)[0])
                pair = f"{place}, pair {tables[first]['pair_id'][at].as_py()!r}, {name}"
                raise InputError(pair, f"{spans[at]} spans", f"{expected[at]}, as the {first} has")


def _spans(table: pa.Table, name: str) -> NDArray[np.int64]:
    return pc.list_value_length(table[name]).to_numpy().astype(np.int64)


def check_scores(place: str, table: pa.Table, logprobs: bool = True) -> None:
    """Look at every score of a shard, as it is written and as it is read.

    Args:
        place: The file.
        table: ``pair_id``, ``chosen`` and ``rejected``.
        logprobs: Whether the scores are log-probs, and not margins.

    Raises:
        InputError: One is NaN, infinite or null, or a log-prob above 0; it names pair, response and span.
    """
    for name in _RESPONSES:
        # A null among the scores becomes NaN.
        scores = pc.list_flatten(table[name]).to_numpy().astype(np.float32)
        for sound, expected in (
            (np.isfinite(scores), "a finite score"),
            (~(logprobs & (scores > ROUNDING)), "a log-prob, which is 0 or less"),
        ):
            if not sound.all():
                at = int(np.flatnonzero(~sound)[0])
                pair_id, span = owner(table["pair_id"], _spans(table, name), at)
                raise InputError(f"{place}, pair {pair_id!r}, {name}, span {span}", str(scores[at]), expected)


def owner(ids: pa.ChunkedArray, lengths: NDArray[np.int64], at: int) -> tuple[object, int]:
    """Of which pair a number is, and its place among those of the pair.

    Args:
        ids: Of the pairs, in order.
        lengths: How many numbers each pair has.
        at: The place among the numbers of all.
    """
    ends = np.cumsum(lengths)
    row = int(np.searchsorted(ends, at, side="right"))
    return ids[row].as_py(), at - int(ends[row - 1] if row else 0)


def _repeated(ids: pa.ChunkedArray) -> object:
    counts = pc.value_counts(ids.combine_chunks())
    return next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
