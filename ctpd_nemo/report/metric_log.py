"""Reading ``metrics.jsonl`` as it is found: with gaps, a line that was cut off, steps that a resumed run did again."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctpd_nemo.json_files import read_rows


@dataclass
class MetricTable:
    """The metrics of a run.

    Attributes:
        rows: Finite numbers by step, ascending, and name; held-out metrics, which begin with ``val_``, among them.
        weights: By step: for "chosen" and "rejected" how many spans have a weight in which bin, by its lower edge.
        notes: What was wrong with the file.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: dict[int, dict[str, dict[float, int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The metrics, in the order in which they turn up."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def series(self, name: str) -> list[tuple[int, float]]:
        """Steps and values of a metric; steps without one are left out."""
        return [(step, row[name]) for step, row in self.rows.items() if name in row]


def read_metrics(path: Path) -> MetricTable:
    """Read what can be read; what cannot is counted in the notes.

    Raises:
        InputError: It is no file, or one of another size than such a log has.
    """
    table = MetricTable()
    if not path.exists():
        return table
    cut_off = ""
    unreadable = repeated = odd = 0
    for line in read_rows(path):
        unreadable += bool(cut_off)
        cut_off = "" if line.endswith("\n") else line
        if cut_off:
            continue
        row = _row(line)
        if row is None:
            unreadable += bool(line.strip())
        else:
            again, left_out = _take_in(table, row)
            repeated += again
            odd += left_out
    if cut_off and (row := _row(cut_off)) is not None:
        _take_in(table, row)
    elif cut_off:
        table.notes.append("the last line is cut off")
    for count, what in (
        (unreadable, "lines that cannot be read"),
        (repeated, "rows of steps that were done again: the last of each counts"),
        (odd, "values that are no finite number"),
    ):
        if count:
            table.notes.append(f"{count:,} {what}")
    table.rows = dict(sorted(table.rows.items()))
    table.weights = dict(sorted(table.weights.items()))
    return table


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


def _take_in(table: MetricTable, row: dict[str, Any]) -> tuple[bool, int]:
    """Add a row; whether its step was there before, and how many of its values are none."""
    known = table.rows.setdefault(row["step"], {})
    repeated, odd = False, 0
    for name, value in row.items():
        if name == "step":
            continue
        if name == "weights" and isinstance(value, dict):
            table.weights[row["step"]] = _counts(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            repeated |= name in known
            known[name] = float(value)
        else:
            odd += 1
    return repeated, odd


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _counts(value: dict[str, Any]) -> dict[str, dict[float, int]]:
    """The readable part of a histogram."""
    sides: dict[str, dict[float, int]] = {}
    for side in ("chosen", "rejected"):
        counts = value.get(side)
        for edge, count in counts.items() if isinstance(counts, dict) else ():
            try:
                lower = float(edge)
            except ValueError:
                continue
            if isinstance(count, int) and count > 0 and not math.isnan(lower):
                sides.setdefault(side, {})[lower] = count
    return sides
