"""Random access to the rows of tables: Parquet files, and folders that the ``datasets`` library wrote."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctpd_nemo.data.changes import WatchedFile
from ctpd_nemo.data.forms import FIELDS
from ctpd_nemo.data.messages import MEDIA, KeptFields, RowError
from ctpd_nemo.data.paths import stem_of
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.parquet_size import check_size, values_once

if TYPE_CHECKING:
    from datasets import Dataset

# What holds messages.
_OF_MESSAGES = ("prompt", "chosen", "rejected", "context", "completions", "completion")


class Parquet:
    """A Parquet file; the columns that are read are decoded once, into Arrow memory."""

    def __init__(self, path: Path, kept: KeptFields) -> None:
        self._path = path
        self._kept = kept
        self.stem = stem_of(path)
        watched = WatchedFile(path)
        self._open()
        self.watched = [watched.opened()]

    def _open(self) -> None:
        try:
            names = pq.read_schema(self._path).names
            wanted = [name for name in dict.fromkeys((*FIELDS, *sorted(self._kept.of_rows))) if name in names]
            texts = [name for name in wanted if name not in MEDIA]
            check_size(self._path, texts)
            self._table = pq.read_table(self._path, columns=texts)
            for name in wanted:
                if name in MEDIA:
                    # Pictures and sounds take all memory there is, and no template of text reads them.
                    self._table = self._table.append_column(name, _is_there(self._path, name))
            self._rows = pq.read_metadata(self._path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(str(self._path), f"a file Arrow cannot read ({error})", "a Parquet file") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_table", "_rows")}

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
            return {name: _as_json(name, self._table.column(name)[row].as_py()) for name in self._table.column_names}
        except UnicodeDecodeError as error:
            raise RowError("invalid_utf8", str(error), "UTF-8") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            # A date beyond Python's, a view out of its buffer.
            raise RowError("wrong_type", f"a value that cannot be read ({error})", "text") from None


def _is_there(path: Path, name: str) -> pa.ChunkedArray:
    """Of each row whether a column holds something, true or null; read some rows at a time."""
    parts = []
    for batch in values_once(path, [name]):
        column = batch.column(0)
        there = column.is_valid()
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            there = pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0)
        parts.append(pc.if_else(there, True, pa.scalar(None, pa.bool_())))
    return pa.chunked_array(parts, type=pa.bool_())


def _as_json(name: str, value: Any) -> Any:
    """A value as a row of JSON has it, without the fields that objects of a column have because others have them.

    A message keeps its own, which say that it has no text, or is none.
    """
    if name in _OF_MESSAGES and isinstance(value, list):
        return [_as_json(name, item) for item in value]
    if name in _OF_MESSAGES and isinstance(value, dict):
        return {field: _as_json(field, part) for field, part in value.items()}
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


class SavedDataset:
    """A folder that ``datasets.Dataset.save_to_disk`` wrote, memory-mapped by that library."""

    def __init__(self, place: str, stem: str, dataset: "Dataset", kept: KeptFields) -> None:
        self.name = place
        self.stem = stem
        wanted = [*FIELDS, *sorted(kept.of_rows - set(FIELDS))]
        columns = dataset.select_columns([name for name in wanted if name in dataset.column_names])
        for name, feature in columns.features.items():
            _check_feature(f"{place}, field {name!r}", feature)
        # Tensors, frames and functions of a user: whatever rows were formatted as when they were saved.
        self._dataset = columns.with_format(None)
        names = sorted({file["filename"] for file in dataset.cache_files})
        self.watched = [WatchedFile(Path(name)).opened() for name in names]

    def __len__(self) -> int:
        return len(self._dataset)

    def line(self, row: int) -> int:
        return row + 1

    def place(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def read(self, row: int) -> dict[str, Any]:
        try:
            return {name: _as_json(name, value) for name, value in self._dataset[row].items()}
        except UnicodeDecodeError as error:
            raise RowError("invalid_utf8", str(error), "UTF-8") from None


def open_saved(path: Path, split: str | None, kept: KeptFields) -> SavedDataset:
    """A folder that ``save_to_disk`` wrote, or one split of it.

    Raises:
        InputError: It cannot be read, has no rows, or not the split.
    """
    # Only this form needs the library, whose import takes longer than reading the other forms.
    from datasets import DatasetDict, load_from_disk

    _check_data_files(path)
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # JSON, Arrow and the library have errors of their own
        found = f"a folder that cannot be read ({error})"
        raise InputError(str(path), found, "a folder that datasets' save_to_disk wrote") from error
    if not isinstance(loaded, DatasetDict):
        return _not_empty(SavedDataset(str(path), path.name, loaded, kept))
    names = ", ".join(loaded)
    if split is None and len(loaded) > 1:
        raise InputError(str(path), f"the splits {names} and none asked for", "the name of one split (data.split)")
    split = split or next(iter(loaded), None)
    if split not in loaded:
        raise InputError(str(path), f"no split {split!r}", f"one of {names}" if names else "a folder with splits")
    return _not_empty(SavedDataset(f"{path}[{split}]", f"{path.name}-{split}", loaded[split], kept))


def _not_empty(source: SavedDataset) -> SavedDataset:
    if len(source) == 0:
        raise InputError(source.name, "no rows", "at least one preference pair")
    return source


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

    # Json is one of later versions.
    if isinstance(feature, Value) or type(feature).__name__ == "Json":
        return
    if isinstance(feature, Sequence | LargeList):
        _check_feature(place, feature.feature)
    elif isinstance(feature, dict | list):
        for part in feature.values() if isinstance(feature, dict) else feature:
            _check_feature(place, part)
    else:
        raise InputError(place, f"a feature of type {type(feature).__name__}", "strings, or lists of messages")
