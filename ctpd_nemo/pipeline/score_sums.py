"""A checksum of what a shard of the score cache says, in the file itself: what is read is what was written."""

import hashlib
import json

import pyarrow as pa
import pyarrow.compute as pc

_KEY = b"ctpd_nemo.blake2b"


def with_sum(table: pa.Table) -> pa.Table:
    """The table with a sum of its content in its metadata."""
    return table.replace_schema_metadata({_KEY: _sum(table).encode()})


def has_its_sum(table: pa.Table, schema: pa.Schema) -> bool:
    """Whether a table says what it said when its sum was made.

    Args:
        table: As read.
        schema: Of the file, with its metadata.
    """
    return (schema.metadata or {}).get(_KEY) == _sum(table).encode()


def _sum(table: pa.Table) -> str:
    """Names and values of all columns: ids as JSON, lists as their lengths and their numbers."""
    digest = hashlib.blake2b(digest_size=32)
    for name in table.column_names:
        column = table[name]
        digest.update(f"{name}\n".encode())
        if pa.types.is_list(column.type):
            for part in (pc.list_value_length(column), pc.list_flatten(column)):
                digest.update(part.to_numpy().tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()
