"""Random access to the rows of one preference file: JSON Lines, Parquet, or a folder of the ``datasets`` library."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctpd_nemo.data.forms import FIELDS, RowError
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

if TYPE_CHECKING:
    from datasets import Dataset


# A pair of the longest contexts there are has some ten million bytes: a line of more is a file of another format.
_LONGEST_LINE = 64 * 1024 * 1024


class RowSource(Protocol):
    """Rows of one file by number, from 0."""

    stem: str

    def __len__(self) -> int: ...

    def line(self, row: int) -> int:
        """The row's line in a text file, its number from 1 elsewhere."""
        ...

    def place(self, row: int) -> str:
        """Where the row is, for people: ``file.jsonl:17``."""
        ...

    def read(self, row: int) -> dict[str, Any]:
        """The row's fields; raises ``RowError`` where they cannot be read."""
        ...


def open_source(path: str | Path, split: str | None) -> RowSource:
    """The rows behind a path; ``split`` names one of a folder with several.

    Raises:
        InputError: There is nothing there, it has no rows, or it is in no known format.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(str(path), "no such file or folder", "a preference file")
    source: RowSource
    if path.is_dir():
        source = _open_folder(path, split)
    elif not path.is_file():
        raise InputError(str(path), "a pipe or a device", "a file that can be read more than once")
    elif path.suffix == ".jsonl":
        source = JsonLines(path)
    elif path.suffix == ".parquet":
        source = Parquet(path)
    else:
        raise InputError(
            str(path),
            f"the extension {path.suffix!r}",
            "a .jsonl file (one row a line), a .parquet file or a folder that datasets' save_to_disk wrote",
        )
    if len(source) == 0:
        raise InputError(str(path), "no rows", "at least one preference pair")
    return source


class JsonLines:
    """A JSON Lines file behind an index of byte offsets; blank lines are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stem = path.stem
        self._open()
        starts, ends, lines = [], [], []
        position = 0
        for number, line in enumerate(iter(partial(self._file.readline, _LONGEST_LINE), b""), start=1):
            if len(line) == _LONGEST_LINE:
                raise InputError(f"{path}:{number}", f"a line of {_LONGEST_LINE:,} bytes or more", "JSON Lines")
            if line.strip():
                starts.append(position)
                ends.append(position + len(line))
                lines.append(number)
            position += len(line)
        self._starts, self._ends, self._lines = (np.array(column, dtype=np.int64) for column in (starts, ends, lines))

    def _open(self) -> None:
        # Stays open for the life of the source; it is only read by position, so forked workers can share it.
        self._file = open(self._path, "rb")  # noqa: SIM115

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
        try:
            # Without its line break, so that an error at the end is not one in the next line.
            value = json.loads(raw.decode("utf-8-sig" if start == 0 else "utf-8").rstrip())
        except UnicodeDecodeError as error:
            found = f"the byte 0x{raw[error.start]:02x} at byte {error.start} of the line"
            raise RowError("invalid_utf8", found, "UTF-8") from None
        except json.JSONDecodeError as error:
            found = f"malformed JSON ({error.msg} at column {error.colno})"
            raise RowError("malformed_json", found, "one JSON object a line") from None
        except (ValueError, RecursionError) as error:
            # Beyond the grammar: a number of thousands of digits, lists nested without end.
            raise RowError("malformed_json", f"JSON that cannot be read ({error})", "one JSON object a line") from None
        if not isinstance(value, dict):
            raise RowError("not_an_object", f"JSON of type {type(value).__name__}", "one JSON object a line")
        return value


class Parquet:
    """A Parquet file; its preference columns are decoded once, into Arrow memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stem = path.stem
        self._open()

    def _open(self) -> None:
        try:
            names = pq.read_schema(self._path).names
            self._table = pq.read_table(self._path, columns=[name for name in FIELDS if name in names])
            self._rows = pq.read_metadata(self._path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(str(self._path), f"a file Arrow cannot read ({error})", "a Parquet file") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "stem": self.stem}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self._rows

    def line(self, row: int) -> int:
        return row + 1

    def place(self, row: int) -> str:
        return f"{self._path}:{row + 1}"

    def read(self, row: int) -> dict[str, Any]:
        try:
            return {name: self._table.column(name)[row].as_py() for name in self._table.column_names}
        except UnicodeDecodeError as error:
            raise RowError("invalid_utf8", str(error), "UTF-8") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            # A date beyond Python's, a view out of its buffer.
            raise RowError("wrong_type", f"a value that cannot be read ({error})", "text") from None


class SavedDataset:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote, memory-mapped by that library."""

    def __init__(self, place: str, stem: str, dataset: "Dataset") -> None:
        self._place = place
        self.stem = stem
        columns = dataset.select_columns([name for name in FIELDS if name in dataset.column_names])
        for name, feature in columns.features.items():
            _check_feature(f"{place}, field {name!r}", feature)
        # Tensors, frames and functions of a user: whatever rows were formatted as when they were saved.
        self._dataset = columns.with_format(None)

    def __len__(self) -> int:
        return len(self._dataset)

    def line(self, row: int) -> int:
        return row + 1

    def place(self, row: int) -> str:
        return f"{self._place}:{row + 1}"

    def read(self, row: int) -> dict[str, Any]:
        try:
            return self._dataset[row]
        except UnicodeDecodeError as error:
            raise RowError("invalid_utf8", str(error), "UTF-8") from None


def _open_folder(path: Path, split: str | None) -> SavedDataset:
    if not (path / "dataset_dict.json").exists() and not (path / "state.json").exists():
        found = "a folder without state.json or dataset_dict.json"
        raise InputError(str(path), found, "a folder that datasets' save_to_disk wrote, or the files themselves")
    # Only this form needs the library, whose import takes longer than reading the other forms.
    from datasets import DatasetDict, load_from_disk

    _check_data_files(path)
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # JSON, Arrow and the library have errors of their own
        found = f"a folder that cannot be read ({error})"
        raise InputError(str(path), found, "a folder that datasets' save_to_disk wrote") from error
    if not isinstance(loaded, DatasetDict):
        return SavedDataset(str(path), path.name, loaded)
    names = ", ".join(loaded)
    if split is None and len(loaded) > 1:
        raise InputError(str(path), f"the splits {names} and none asked for", "the name of one split (data.split)")
    split = split or next(iter(loaded), None)
    if split not in loaded:
        raise InputError(str(path), f"no split {split!r}", f"one of {names}" if names else "a folder with splits")
    return SavedDataset(f"{path}[{split}]", f"{path.name}-{split}", loaded[split])


def _check_data_files(path: Path) -> None:
    """The files that a saved folder names are its own.

    Raises:
        InputError: A folder of a split, or a file of rows, that lies elsewhere.
    """
    folders = [path]
    if (path / "dataset_dict.json").exists():
        splits = read_object(path / "dataset_dict.json", "the names of splits").get("splits")
        if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
            raise InputError(str(path / "dataset_dict.json"), f"splits = {splits!r}", "names of folders in this one")
        folders = [path / name for name in splits]
    for folder in folders:
        state = folder / "state.json"
        files = read_object(state, "the state of a saved dataset").get("_data_files")
        names = [file.get("filename") if isinstance(file, dict) else file for file in files or ()]
        for name in names:
            if not _is_plain_name(name):
                raise InputError(f"{state}, _data_files", repr(name), "names of files in the same folder")


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _check_feature(place: str, feature: Any) -> None:
    """Text and what holds text: other features (images, audio) open the files that rows name."""
    from datasets import LargeList, Sequence, Value

    if isinstance(feature, Value):
        return
    if isinstance(feature, Sequence | LargeList):
        _check_feature(place, feature.feature)
    elif isinstance(feature, dict | list):
        for part in feature.values() if isinstance(feature, dict) else feature:
            _check_feature(place, part)
    else:
        raise InputError(place, f"a feature of type {type(feature).__name__}", "strings, or lists of messages")
