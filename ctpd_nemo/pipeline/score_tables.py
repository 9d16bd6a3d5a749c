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


# The number of a pair in the data that was scored; caches of before know pairs by their ids.
NUMBER = "row"

Key = int | str


def rows_of_pairs(tables: Mapping[str, pa.Table]) -> tuple[bool, dict[str, dict[Key, int]]]:
    """Where the scores of each pair are.

    Args:
        tables: Of each role: ``pair_id``, and ``row`` unless an earlier version wrote it.

    Returns:
        Whether pairs are known by their numbers, else by their ids; and of each role, from that to its row.
    """
    by_number = all(NUMBER in table.column_names for table in tables.values())
    names = {role: table[NUMBER if by_number else "pair_id"].to_pylist() for role, table in tables.items()}
    return by_number, {role: {name: row for row, name in enumerate(own)} for role, own in names.items()}


def check_tables(
    folders: Mapping[str, Path], tables: Mapping[str, pa.Table], rows: Mapping[str, Mapping[Key, int]]
) -> None:
    """Compare the scores of all roles of a run.

    Args:
        folders: The cache that each role is from.
        tables: Of each role: ``pair_id``, and ``chosen`` and ``rejected`` with a list of scores each.
        rows: Of each role, see ``rows_of_pairs``.

    Raises:
        InputError: A pair that is there twice, or for one role only; a response of other spans for one role than for
            another.
    """
    first = next(iter(tables))
    for role, table in tables.items():
        place = f"{folders[role]}, {role}"
        if len(rows[role]) < len(table):
            twice = table["pair_id"][repeated(table, rows[role])].as_py()
            raise InputError(place, f"pair {twice!r} twice", "scores of each pair once; remove the cache, score again")
        for key in rows[first].keys() ^ rows[role].keys():
            holder, lacking = (first, role) if key in rows[first] else (role, first)
            pair_id = tables[holder]["pair_id"][rows[holder][key]].as_py()
            raise InputError(
                f"{folders[lacking]}, {lacking}", f"no pair {pair_id!r}", "scores of every pair of the data"
            )
        order = np.array([rows[role][key] for key in rows[first]])
        _check_ids(f"{folders[role]}, {role}", table["pair_id"].take(order), tables[first]["pair_id"])
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


def _check_ids(place: str, ids: pa.ChunkedArray, expected: pa.ChunkedArray) -> None:
    """Stop where one role calls a pair otherwise than the first does."""
    other = pc.not_equal(ids, expected)
    if pc.any(other).as_py():
        pair_id = ids.filter(other)[0].as_py()
        if pc.is_in(pa.scalar(pair_id), value_set=expected.combine_chunks()).as_py():
            raise InputError(
                place, f"pair {pair_id!r} twice", "scores of each pair once; remove the cache, score again"
            )
        found = f"no pair {expected.filter(other)[0].as_py()!r} but one {pair_id!r}"
        raise InputError(place, found, "scores of every pair of the data")


def repeated(table: pa.Table, rows: Mapping[Key, int]) -> int:
    """A row of a pair that has another one, too: of those, ``rows`` holds the last."""
    last = set(rows.values())
    return next(row for row in range(len(table)) if row not in last)
