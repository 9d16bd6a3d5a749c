"""The teacher's largest log-probs at each token of the chosen responses, computed once, for distillation.

They lie beside the span scores of the same job, in Parquet shards over the same ranges of pairs::

    top_k.json
    top_k-00000.parquet     pair_id: string
                            row: int64                  the number of the pair in the data
                            logprobs: list<half or float>   k a token in descending order, in nats, token after token
                            ids: list<int32>                the words that they are of, in the teacher's vocabulary
                            tail: list<float>               one a token: what all other probabilities add up to

``6 k + 4`` bytes a token in half precision, ``8 k + 4`` in float32, before Parquet's compression. Training reads
``logprobs`` and ``tail``; a shard that is there is whole.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.errors import InputError
from ctpd_nemo.parquet_size import check_size
from ctpd_nemo.pipeline.score_cache import FINGERPRINTS, ManifestWriter, write_renamed
from ctpd_nemo.pipeline.score_sums import check_sums, with_sums
from ctpd_nemo.pipeline.score_tables import NUMBER, ROUNDING, owner, repeated, rows_of_pairs

Float32Array = NDArray[np.float32]

_MANIFEST = "top_k.json"
_FORMAT = 1
_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


@dataclass(frozen=True)
class PairTopK:
    """One pair's chosen response of n tokens.

    Attributes:
        pair_id: What the user calls the pair.
        logprobs: f32 ``[n, k]``, descending.
        ids: int32 ``[n, k]``.
        tail: f32 ``[n]``.
        row: The number of the pair in the data; ``None`` in caches that earlier versions wrote.
    """

    pair_id: str
    logprobs: Float32Array
    ids: NDArray[np.int32]
    tail: Float32Array
    row: int | None = None


class TopKWriter(ManifestWriter):
    """Writes what ``top_k.json`` says; one job does it."""

    def __init__(
        self,
        folder: str | Path,
        fingerprints: Mapping[str, str],
        teacher_weights: str,
        n_pairs: int,
        pairs_per_shard: int,
        k: int,
        dtype: str,
    ) -> None:
        """Check what is there, or make a new manifest in memory; ``begin`` writes it.

        Args:
            folder: The score cache that it is part of.
            fingerprints: Of everything but the weights, by the names in ``FINGERPRINTS``.
            teacher_weights: Fingerprint of the weights of the role "reference".
            n_pairs: Pairs of the data.
            pairs_per_shard: Pairs a shard.
            k: Log-probs a token.
            dtype: "float16" or "float32".

        Raises:
            InputError: What is there was computed from something else.
        """
        super().__init__(folder, _MANIFEST)
        self.n_shards = -(-n_pairs // pairs_per_shard)
        self._type = _TYPES[dtype]
        self._manifest = {
            "format": _FORMAT,
            "k": k,
            "dtype": dtype,
            "pairs": n_pairs,
            "pairs_per_shard": pairs_per_shard,
            "shards": self.n_shards,
            "fingerprints": {name: fingerprints[name] for name in FINGERPRINTS},
            "teacher_weights": teacher_weights,
        }
        if self.manifest.exists():
            there = _read_manifest(self.folder)
            for name, value in self._manifest.items():
                _compare(self.folder, name, there.get(name), value)

    def missing(self) -> list[int]:
        """Shards that are not there."""
        return [shard for shard in range(self.n_shards) if not _shard_path(self.folder, shard).exists()]

    def write(self, shard: int, pairs: Sequence[PairTopK]) -> None:
        """Write one shard.

        Raises:
            InputError: A log-prob is not finite, or above 0; what is left of the probabilities is no probability.
        """
        path = _shard_path(self.folder, shard)
        rows = [pair.row for pair in pairs]
        table = pa.table(
            {
                "pair_id": [pair.pair_id for pair in pairs],
                **({} if None in rows else {NUMBER: pa.array(rows, pa.int64())}),
                "logprobs": _lists([pair.logprobs for pair in pairs], self._type),
                "ids": _lists([pair.ids for pair in pairs], pa.int32()),
                "tail": _lists([pair.tail for pair in pairs], pa.float32()),
            }
        )
        _check_numbers(path, table)
        write_renamed(path, lambda writing: pq.write_table(with_sums(table), writing))


class TopKReader:
    """The log-probs by pair; goes to dataloader workers.

    Attributes:
        k: How many a token.
        fingerprint: A name for what they were computed from, weights included.
    """

    def __init__(self, folder: str | Path, fingerprints: Mapping[str, str], teacher_weights: str | None) -> None:
        """Open what a scoring job wrote with ``top_k``, and check that it belongs to a run.

        Args:
            folder: The score cache.
            fingerprints: What the run would compute it from, by the names in ``FINGERPRINTS``.
            teacher_weights: Fingerprint of the teacher's weights, where the run names their folder.

        Raises:
            InputError: There is none, it is of something else, a shard is missing or cannot be read, or holds what
                cannot be a log-prob or a probability.
        """
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        for name in FINGERPRINTS:
            _compare(self.folder, name, manifest["fingerprints"].get(name), fingerprints[name])
        if teacher_weights is not None:
            _compare(self.folder, "teacher_weights", manifest["teacher_weights"], teacher_weights)
        self.k: int = manifest["k"]
        identity = {name: manifest[name] for name in ("fingerprints", "teacher_weights", "k", "dtype")}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        tables = [self._read(shard, manifest) for shard in range(manifest["shards"])]
        if not all(NUMBER in table.column_names for table in tables):
            # A cache that an earlier version began: then its ids differ.
            tables = [table.select([name for name in table.column_names if name != NUMBER]) for table in tables]
        self._table = pa.concat_tables(tables).combine_chunks()
        self._by_number, rows = rows_of_pairs({"top_k": self._table})
        self._rows = rows["top_k"]
        if len(self._rows) < len(self._table):
            twice = self._table["pair_id"][repeated(self._table, self._rows)].as_py()
            expected = "log-probs of each pair once; remove the cache, score again"
            raise InputError(f"{self.folder}, top_k", f"pair {twice!r} twice", expected)

    def _read(self, shard: int, manifest: Mapping[str, Any]) -> pa.Table:
        path = _shard_path(self.folder, shard)
        if not path.exists():
            raise InputError(str(self.folder), f"no {path.name}", f"{manifest['shards']} shards; finish scoring first")
        try:
            stored = pq.read_schema(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        schema = pa.schema(
            [
                ("pair_id", pa.string()),
                *([(NUMBER, pa.int64())] if NUMBER in stored.names else []),
                # Offsets of 64 bits: all tokens of a run are joined.
                ("logprobs", pa.large_list(_TYPES[manifest["dtype"]])),
                ("tail", pa.large_list(pa.float32())),
            ]
        )
        try:
            check_size(path, schema.names)
            table = pq.read_table(path, columns=schema.names).cast(schema)
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        for name in schema.names:
            if table[name].null_count:
                raise InputError(str(path), f"{table[name].null_count} rows without {name}", "values in every row")
        check_sums(str(path), table, stored)
        _check_numbers(path, table)
        return table

    def lookup(self, pair: EncodedPair | str) -> tuple[Float32Array, Float32Array]:
        """Log-probs of the chosen response f32 ``[n, k]``, and what the other probabilities add up to ``[n]``.

        Args:
            pair: Which; its id alone will do for a cache of an earlier version, which knows no more of it.

        Raises:
            InputError: There are none of the pair, or not ``k`` of each token.
        """
        pair_id = pair if isinstance(pair, str) else pair.id
        at = self._rows.get(pair_id if isinstance(pair, str) or not self._by_number else pair.index)
        if at is None:
            raise InputError(f"{self.folder}, top_k", f"no pair {pair_id!r}", "log-probs of every pair of the data")
        logprobs, tail = (
            self._table[name][at].values.to_numpy(zero_copy_only=False).astype(np.float32)
            for name in ("logprobs", "tail")
        )
        if len(logprobs) != self.k * len(tail):
            found = f"{len(logprobs)} log-probs of {len(tail)} tokens"
            raise InputError(f"{self.folder}, top_k, pair {pair_id!r}", found, f"{self.k} of each")
        return logprobs.reshape(-1, self.k), tail


def _unreadable(path: Path, error: Exception) -> InputError:
    found = f"a shard that cannot be read ({str(error).splitlines()[0]})"
    return InputError(str(path), found, "a Parquet shard; remove it and score again")


def _check_numbers(path: Path, table: pa.Table) -> None:
    """Look at every number of a shard, as it is written and as it is read; in half precision, as it lies there.

    Raises:
        InputError: It names the pair.
    """
    for name, most, expected in (
        ("logprobs", ROUNDING, "a finite log-prob, which is 0 or less"),
        ("tail", 1 + ROUNDING, "what other words' probabilities add up to, from 0 to 1"),
    ):
        values = pc.list_flatten(table[name]).to_numpy()
        # A null among them becomes NaN.
        sound = np.isfinite(values) & (values <= most)
        if name == "tail":
            sound &= values >= 0
        if not sound.all():
            at = int(np.flatnonzero(~sound)[0])
            lengths = pc.list_value_length(table[name]).to_numpy().astype(np.int64)
            pair_id, place = owner(table["pair_id"], lengths, at)
            raise InputError(f"{path}, pair {pair_id!r}, {name}, {place}", str(values[at]), expected)


def top_k_is_whole(folder: str | Path) -> bool:
    """Whether the manifest is there, and every shard that it names."""
    if not (Path(folder) / _MANIFEST).is_file():
        return False
    shards = range(_read_manifest(Path(folder))["shards"])
    return all(_shard_path(Path(folder), shard).exists() for shard in shards)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise InputError(str(folder), f"no {_MANIFEST}", "a score cache, written with method.top_k")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise InputError(str(path), f"no JSON object ({error})", "the manifest of cached log-probs") from error
    if found != _FORMAT:
        raise InputError(str(path), f"format {found!r}", f"format {_FORMAT}")
    kinds = {"k": int, "dtype": str, "shards": int, "fingerprints": dict, "teacher_weights": str}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise InputError(f"{path}, {name}", repr(manifest.get(name)), f"a value of type {kind.__name__}")
    if manifest["dtype"] not in _TYPES:
        raise InputError(f"{path}, dtype", repr(manifest["dtype"]), " or ".join(_TYPES))
    return manifest


def _compare(folder: Path, name: str, there: object, here: object) -> None:
    if there != here:
        raise InputError(f"{folder}/{_MANIFEST}, {name}", f"{there}", f"{here}, as this run has it")


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"top_k-{shard:05d}.parquet"


def _lists(rows: Sequence[NDArray[Any]], kind: pa.DataType) -> pa.Array:
    """One list a row, of all its values in order."""
    flat = np.concatenate([row.ravel() for row in rows]) if rows else np.empty(0, dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind.to_pandas_dtype()), type=kind))
