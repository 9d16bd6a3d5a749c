"""The form of a table: rows are methods, as in the paper; Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from ctpd_nemo.planner.tables import Table
from ctpd_nemo.reproduce.config import TableConfig
from ctpd_nemo.reproduce.scores import AVERAGE, BENCHMARKS, Cell

Rows = Mapping[str, Mapping[str, Cell]]


def score_table(table: TableConfig, rows: Rows, seeds: Sequence[int], paper: Mapping[str, Sequence[float]]) -> Table:
    """Means and standard errors; the paper's figures in brackets, where the experiment is the paper's."""
    reported = {name: paper_cells(values) for name, values in paper.items()}
    columns = list(dict.fromkeys([*next(iter(reported.values()), {}), *_columns(rows)]))
    names = [*(name for name in reported if name not in table.rows), *table.rows] if paper else list(table.rows)
    cells = [
        [name, *(_cell(rows.get(name, {}).get(column), reported.get(name, {}).get(column)) for column in columns)]
        for name in names
    ]
    over = f"mean ± standard error over {len(seeds)} seeds" if len(seeds) > 1 else "± standard error"
    brackets = "; in brackets what the paper reports" if paper else ""
    return Table(f"Table {table.number}. {table.title}: {over}{brackets}", [" Method", *columns], cells)


def difference_table(table: TableConfig, rows: Rows) -> Table:
    """Every row less one of them, seed by seed."""
    columns = _columns(rows)
    base = rows[table.against]
    cells = [
        [name, *(_text(row[column].less(base[column]), signed=True) for column in columns)]
        for name, row in rows.items()
        if name != table.against
    ]
    title = f"Less {table.against} of the same seed: mean ± standard error"
    return Table(title, [" Method", *columns], cells)


def paper_cells(values: Sequence[float]) -> dict[str, Cell]:
    """A row of the paper: scores alone or each with its standard error behind it, and the average last."""
    *scores, average = values
    alone = len(scores) == len(BENCHMARKS)
    both = [(score, None) for score in scores] if alone else list(pairwise(scores))[::2]
    cells = {title: Cell(score, error, (score,)) for title, (score, error) in zip(BENCHMARKS, both, strict=True)}
    return {**cells, AVERAGE: Cell(average, None, (average,))}


def as_values(rows: Rows, table: TableConfig) -> dict[str, Any]:
    """The same for JSON."""
    values: dict[str, Any] = {
        "rows": {name: {column: asdict(cell) for column, cell in row.items()} for name, row in rows.items()}
    }
    base = rows.get(table.against)
    if base and all(rows.values()):
        values["differences"] = {
            name: {column: asdict(row[column].less(base[column])) for column in _columns(rows)}
            for name, row in rows.items()
            if name != table.against
        }
    return values


def _columns(rows: Rows) -> list[str]:
    """Of all rows, in the order of the first that has them."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def _cell(ours: Cell | None, papers: Cell | None) -> str:
    text = _text(ours) if ours else "-"
    return f"{text} ({_text(papers)})" if papers else text


def _text(cell: Cell, signed: bool = False) -> str:
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    return f"{cell.mean:{'+' if signed else ''}.2f}{error}"
