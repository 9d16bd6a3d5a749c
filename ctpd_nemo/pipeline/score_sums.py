"""Checksums of what a shard of a score cache says, in the file itself: what is read is what was written."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctpd_nemo.errors import InputError

_KEY = b"ctpd_nemo.blake2b"


def with_sums(table: pa.Table) -> pa.Table:
    """The table with a sum of each column in its metadata."""
    sums = {name: _sum(table[name]) for name in table.column_names}
    return table.replace_schema_metadata({_KEY: json.dumps(sums).encode()})


def check_sums(path: str, table: pa.Table, schema: pa.Schema) -> None:
    """Stop where columns do not say what they said when their sums were made.

    Args:
        path: Of the shard.
        table: Columns of it, as read.
        schema: Of the file, with its metadata.

    Raises:
        InputError: It names the column, or there are no sums.
    """
    expected = "a whole shard; remove it and score again"
    try:
        sums = dict(json.loads((schema.metadata or {})[_KEY]))
    except (KeyError, ValueError, TypeError):
        raise InputError(path, "no checksums, as if an earlier version had written it", expected) from None
    for name in table.column_names:
        if sums.get(name) != _sum(table[name]):
            raise InputError(f"{path}, {name}", "other values than were written (their checksum differs)", expected)


def _sum(column: pa.ChunkedArray) -> str:
    """Of values in their order: ids as JSON, lists as their lengths and their numbers."""
    digest = hashlib.blake2b(digest_size=32)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        digest.update(pc.list_value_length(column).to_numpy().astype(np.int64).tobytes())
        digest.update(pc.list_flatten(column).to_numpy().tobytes())
    else:
        digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()
