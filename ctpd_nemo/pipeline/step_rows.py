"""JSON lines that a run writes step by step, and cuts back where it does steps again."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctpd_nemo.json_files import read_rows
from ctpd_nemo.parallel.checkpoint_files import write_whole

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class StepRows:
    """A file of one JSON object a line, each with its ``step``; one process writes.

    Rows that a full disk has no room for are written when there is some. A number that is NaN or infinite, which JSON
    has no word for, is ``null``.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: The JSON-lines file; there is none until there is a row.
        """
        self.path = path
        self._waiting: list[str] = []

    def cut_back(self, stays: Callable[[Row], bool]) -> Row | None:
        """Drop rows of what will be done again, and lines that are no rows.

        Args:
            stays: Whether a row is of what is done.

        Returns:
            The last row that stays, if any does.

        Raises:
            InputError: The file is no log.
        """
        if not self.path.exists():
            return None
        kept = [(line, row) for line, row in _whole_rows(self.path) if stays(row)]
        write_whole(self.path, "".join(line + "\n" for line, _ in kept))
        return kept[-1][1] if kept else None

    def append(self, row: Row) -> None:
        """Write a row, and those that wait."""
        self._waiting.append(json.dumps(_finite_or_null(row), allow_nan=False) + "\n")
        size = None
        try:
            with self.path.open("a", encoding="utf-8") as file:
                size = file.tell()
                file.write("".join(self._waiting))
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    # What was written of a line would run into the next.
                    os.truncate(self.path, size)
            logger.warning("%s: %d rows wait to be written: %s", self.path, len(self._waiting), error)
        else:
            self._waiting.clear()


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_null(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite_or_null(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Lines and what they hold; a process that was killed may leave half a line."""
    for line in map(str.rstrip, read_rows(path)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield line, row
        else:
            logger.warning("%s: left out, as it is no whole row: %.60r", path, line)
