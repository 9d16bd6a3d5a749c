"""The form of a table: rows are methods, as in the paper; Markdown and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from ctpd_nemo.planner.tables import Table
from ctpd_nemo.reproduce.config import TableConfig
from ctpd_nemo.reproduce.scores import AVERAGE, BENCHMARKS, Cell
from ctpd_nemo.reproduce.significance import LEVEL, holm

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


def seed_table(table: TableConfig, rows: Rows, seeds: Sequence[int]) -> Table:
    """What the means are of: a row that one seed decides shows here."""
    columns = _columns(rows)
    cells = [
        [name, str(seed), *(f"{row[column].values[at]:.2f}" for column in columns)]
        for name, row in rows.items()
        for at, seed in enumerate(seeds)
    ]
    return Table(f"Table {table.number} by seed", [" Method", "seed", *columns], cells)


def difference_table(table: TableConfig, rows: Rows) -> Table:
    """Every row less one of them, seed by seed: means, and what seeds so few can say of them."""
    columns = _columns(rows)
    found = differences(table, rows)
    marks = _marks({(name, column): row[column].p_value for name, row in found.items() for column in columns})
    cells = [
        [name, *(_difference(row[column], marks[name, column]) for column in columns)] for name, row in found.items()
    ]
    title = f"Less {table.against} of the same seed: mean"
    n_seeds = len(rows[table.against][columns[0]].values)
    if n_seeds > 1:
        title += (
            f" [95 % interval of t with {n_seeds - 1} degree{'s' if n_seeds > 2 else ''} of freedom];"
            f" * excludes 0, ** also by Holm's correction for all {len(found) * len(columns)} of this table"
        )
    return Table(title, [" Method", *columns], cells)


def differences(table: TableConfig, rows: Rows) -> dict[str, dict[str, Cell]]:
    """Every row less the one that the table is against."""
    base = rows[table.against]
    return {
        name: {column: row[column].less(base[column]) for column in _columns(rows)}
        for name, row in rows.items()
        if name != table.against
    }


def _marks(p_values: Mapping[tuple[str, str], float | None]) -> dict[tuple[str, str], str]:
    """Of each difference; those without a p-value have none."""
    known = {place: value for place, value in p_values.items() if value is not None}
    together = dict(zip(known, holm(list(known.values())), strict=True))
    marks = dict.fromkeys(p_values, "")
    for place, alone in known.items():
        if alone < 1 - LEVEL:
            marks[place] = " **" if together[place] < 1 - LEVEL else " *"
    return marks


def _difference(cell: Cell, mark: str) -> str:
    if cell.interval is None:
        return f"{cell.mean:+.2f}"
    lower, upper = cell.interval
    return f"{cell.mean:+.2f} [{lower:+.2f}, {upper:+.2f}]{mark}"


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
    if rows.get(table.against) and all(rows.values()):
        values["differences"] = {
            name: {
                column: asdict(cell) | {"interval": cell.interval, "p_value": cell.p_value}
                for column, cell in row.items()
            }
            for name, row in differences(table, rows).items()
        }
    return values


def _columns(rows: Rows) -> list[str]:
    """Of all rows, in the order of the first that has them."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def _cell(ours: Cell | None, papers: Cell | None) -> str:
    text = _text(ours) if ours else "-"
    return f"{text} ({_text(papers)})" if papers else text


def _text(cell: Cell) -> str:
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    return f"{cell.mean:.2f}{error}"
