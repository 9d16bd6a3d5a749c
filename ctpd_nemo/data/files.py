"""Random access to the rows of preference files: JSON Lines, JSON, Parquet, and folders of them."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ctpd_nemo.data.changes import WatchedFile
from ctpd_nemo.data.json_array import row_bounds
from ctpd_nemo.data.messages import MEANT, KeptFields, RowError
from ctpd_nemo.data.paths import EXPECTED, expand, files_of_folder, form_of, is_packed, is_saved_dataset, stem_of
from ctpd_nemo.data.tables import Parquet, open_saved
from ctpd_nemo.data.unpack import unpacked
from ctpd_nemo.errors import InputError

# A pair of the longest contexts there are has some ten million bytes: a line of more is a file of another format.
_LONGEST_LINE = 64 * 1024 * 1024


class RowSource(Protocol):
    """Rows of one file by number, from 0."""

    stem: str
    watched: list[WatchedFile]

    def __len__(self) -> int: ...

    def line(self, row: int) -> int:
        """The row's line in a text file of a row a line, its number from 1 elsewhere."""
        ...

    def place(self, row: int) -> str:
        """Where the row is, for people: ``file.jsonl:17``."""
        ...

    def read(self, row: int) -> dict[str, Any]:
        """The row's fields; raises ``RowError`` where they cannot be read."""
        ...


def open_sources(path: str | Path, split: str | None = None, kept: KeptFields = MEANT) -> list[RowSource]:
    """The rows behind a path, a pattern or a folder, file after file.

    Args:
        path: As a user names it.
        split: Which split of a folder that has several.
        kept: Columns beside those of a pair that are read of tables, too.

    Raises:
        InputError: There is nothing there, it has no rows, or it is in no known format.
    """
    return [source for found in expand([path]) for source in _open(found, split, kept)]


def _open(path: Path, split: str | None, kept: KeptFields) -> list[RowSource]:
    if not path.exists():
        raise InputError(str(path), "no such file or folder", "a preference file")
    if path.is_dir() and not is_saved_dataset(path):
        return [_open_file(file, kept) for file in files_of_folder(path, split)[1]]
    return [open_saved(path, split, kept)] if path.is_dir() else [_open_file(path, kept)]


def _open_file(path: Path, kept: KeptFields) -> RowSource:
    form = form_of(path)
    source: RowSource
    if not path.is_file():
        raise InputError(str(path), "a pipe or a device", "a file that can be read more than once")
    if form == ".parquet":
        source = Parquet(path, kept)
    elif form:
        source = JsonFile(path)
    else:
        raise InputError(str(path), f"the extension {path.suffix!r}", EXPECTED)
    if len(source) == 0:
        raise InputError(str(path), "no rows", "at least one preference pair")
    return source


class JsonFile:
    """A JSON Lines file, or one of a JSON list, behind an index of byte offsets; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stem = stem_of(path)
        watched = WatchedFile(path)
        self._open()
        bounds = row_bounds(self._file, str(path)) if form_of(path) == ".json" else None
        self._is_lines = bounds is None
        index = _lines(self._file, path) if bounds is None else _elements(bounds, path)
        self._starts, self._ends, self._lines = np.array(index, dtype=np.int64).reshape(-1, 3).T.copy()
        self.watched = [watched.opened()]

    def _open(self) -> None:
        # Stays open for the life of the source; it is only read by position, so forked workers can share it.
        self._file: BinaryIO = unpacked(self._path) if is_packed(self._path) else open(self._path, "rb")  # noqa: SIM115

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, row: int) -> int:
        return int(self._lines[row])

    def place(self, row: int) -> str:
        return f"{self._path}:{self._lines[row]}"

    def read(self, row: int) -> dict[str, Any]:
        start, end = int(self._starts[row]), int(self._ends[row])
        raw = os.pread(self._file.fileno(), end - start, start)
        what = "line" if self._is_lines else "row"
        expected = f"one JSON object a {what}"
        try:
            # Without its line break, so that an error at the end is not one in the next line.
            value = json.loads(raw.decode("utf-8-sig" if start == 0 else "utf-8").rstrip())
        except UnicodeDecodeError as error:
            found = f"the byte 0x{raw[error.start]:02x} at byte {error.start} of the {what}"
            raise RowError("invalid_utf8", found, "UTF-8") from None
        except json.JSONDecodeError as error:
            found = f"malformed JSON ({error.msg} at column {error.colno})"
            raise RowError("malformed_json", found, expected) from None
        except (ValueError, RecursionError) as error:
            # Beyond the grammar: a number of thousands of digits, lists nested without end.
            raise RowError("malformed_json", f"JSON that cannot be read ({error})", expected) from None
        if not isinstance(value, dict):
            raise RowError("not_an_object", f"JSON of type {type(value).__name__}", expected)
        return value


def _lines(file: BinaryIO, path: Path) -> list[tuple[int, int, int]]:
    """Begin, end and number of each line that is not blank."""
    found, position = [], 0
    file.seek(0)
    for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE), b""), start=1):
        if len(line) == _LONGEST_LINE:
            raise InputError(f"{path}:{number}", f"a line of {_LONGEST_LINE:,} bytes or more", "JSON Lines")
        if line.strip():
            found.append((position, position + len(line), number))
        position += len(line)
    return found


def _elements(bounds: list[tuple[int, int]], path: Path) -> list[tuple[int, int, int]]:
    """Begin, end and number of each element of a list."""
    for number, (begin, end) in enumerate(bounds, start=1):
        if end - begin >= _LONGEST_LINE:
            raise InputError(f"{path}:{number}", f"a row of {_LONGEST_LINE:,} bytes or more", "a list of pairs")
    return [(begin, end, number) for number, (begin, end) in enumerate(bounds, start=1)]
