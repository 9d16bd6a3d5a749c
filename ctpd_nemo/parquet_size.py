"""How large a Parquet file is once it is read: it may say one long value a million times in a few hundred bytes."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctpd_nemo.errors import InputError

# As of text that is packed with gzip; tables of pairs hold five to ten times the bytes of their files, and what repeats
# itself a hundred times.
_MOST_TIMES = 200
_ALWAYS_ALLOWED = 64 * 2**20
# Rows that are looked at together.
_BATCH = 4096


def check_size(path: Path, names: Collection[str]) -> None:
    """Stop where some columns of a file are beyond all measure larger in memory than on the disk.

    Values are counted where they are kept once, before anything is made of them: an Arrow table has each value of text
    as often as there are rows with it.

    Args:
        path: The file.
        names: The columns that are to be read.

    Raises:
        InputError: They take more than 64 MiB, and more than 200 times what the file has.
        pyarrow.ArrowException: It is no Parquet file.
    """
    most = max(_ALWAYS_ALLOWED, _MOST_TIMES * os.path.getsize(path))
    if _stated(path) > most or _is_more(path, names, most):
        found = f"more than {most:,} bytes in a file of {os.path.getsize(path):,}"
        raise InputError(str(path), found, f"tables that pack to no less than 1/{_MOST_TIMES} of their size")


def values_once(path: Path, names: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Columns some rows at a time, text as numbers of its different values.

    Args:
        path: The file.
        names: The columns.

    Raises:
        pyarrow.ArrowException: It is no Parquet file, or damaged.
    """
    file = pq.ParquetFile(path, read_dictionary=[leaf for leaf in _leaves(path) if leaf.partition(".")[0] in names])
    # Groups of rows have numbers of their own, which Arrow cannot join in lists.
    for group in range(file.num_row_groups):
        yield from file.iter_batches(_BATCH, row_groups=[group], columns=list(names))


def _leaves(path: Path) -> list[str]:
    """What the columns of a file are stored as, by their paths."""
    schema = pq.read_metadata(path).schema
    return [schema.column(number).path for number in range(len(schema.names))]


def _stated(path: Path) -> int:
    """Bytes of what is stored, unpacked, by what the file says of itself."""
    metadata = pq.read_metadata(path)
    # Not of columns: pyarrow ends the process over a damaged one where it is only looked at.
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def _is_more(path: Path, names: Collection[str], most: int) -> bool:
    """Whether what some columns hold, each value as often as a row has it, is more than so many bytes."""
    counted = 0
    for batch in values_once(path, names):
        counted += sum(map(_bytes, batch.columns))
        if counted > most:
            return True
    return False


def _bytes(array: pa.Array) -> int:
    """Of an array that has each of its values as often as it is there."""
    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return array.indices.nbytes + (pc.sum(lengths).as_py() or 0)
    if isinstance(array, pa.StructArray):
        return sum(map(_bytes, array.flatten()))
    if isinstance(array, pa.MapArray):
        return _bytes(array.keys) + _bytes(array.items)
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return 8 * len(array) + _bytes(array.flatten())
    return array.nbytes
