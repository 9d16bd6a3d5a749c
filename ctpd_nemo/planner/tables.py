"""Tables for a terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What stands above it.
        columns: Heads; one that begins with a space is set flush left.
        rows: Cells.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """Columns as wide as they need to be."""
        widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]
        lines = [self.title, ""]
        for row in [self.columns, *self.rows]:
            cells = [self._set(cell, i, widths[i]) for i, cell in enumerate(row)]
            lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)

    def _set(self, cell: str, column: int, width: int) -> str:
        return cell.strip().ljust(width) if self.columns[column].startswith(" ") else cell.rjust(width)

    def as_markdown(self) -> str:
        """A Markdown table below its title."""
        marks = ["---" if column.startswith(" ") else "---:" for column in self.columns]
        rows = [[column.strip() for column in self.columns], marks, *([cell.strip() for cell in r] for r in self.rows)]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(row) + " |" for row in rows)])
