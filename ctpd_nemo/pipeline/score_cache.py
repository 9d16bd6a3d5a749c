"""The span score cache: what frozen models say of every span, computed once.

A folder of ``manifest.json`` and Parquet shards, a set of shards for each role (``models.roles``)::

    manifest.json
    reference-00000.parquet     pair_id: string, chosen: list<float>, rejected: list<float>, row: int64
    positive-00000.parquet      one float a span, in nats

``row`` is the number of the pair in the data; shards that earlier versions wrote have none, and ids that differ.

A shard covers a fixed range of pairs. It is written under a temporary name and renamed, so a shard that is there is
whole, and an interrupted job goes on with the first that is missing. Each has a checksum of what it says. The manifest
holds a fingerprint of everything the numbers depend on.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.models.weighted import WeightedConfig
from ctpd_nemo.models.weighting import Weighting
from ctpd_nemo.parallel.checkpoint_files import flush
from ctpd_nemo.parquet_size import check_size
from ctpd_nemo.pipeline.score_sums import check_sums, with_sums
from ctpd_nemo.pipeline.score_tables import NUMBER, check_scores, check_tables, rows_of_pairs
from ctpd_nemo.text_files import naming

FINGERPRINTS = (
    "data",
    "teacher_tokenizer",
    "student_tokenizer",
    "teacher_template",
    "student_template",
    "truncation",
    "precision",
)
_MANIFEST = "manifest.json"
_FORMAT = 1
_FIELDS = {"pairs": int, "pairs_per_shard": int, "shards": int, "fingerprints": dict, "teacher_weights": dict}
_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("chosen", pa.list_(pa.float32())),
        ("rejected", pa.list_(pa.float32())),
        (NUMBER, pa.int64()),
    ]
)

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class PairScores:
    """Span log-probs of one pair under one model, f32 ``[n_spans]`` each.

    Attributes:
        pair_id: What the user calls the pair.
        chosen: Of the chosen response.
        rejected: Of the rejected response.
        row: The number of the pair in the data; ``None`` in caches that earlier versions wrote.
    """

    pair_id: str
    chosen: Float32Array
    rejected: Float32Array
    row: int | None = None


class ManifestWriter:
    """Writes what says what is in a folder of shards.

    Attributes:
        folder: It.
        manifest: The file.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        """Args:
        folder: Of the shards.
        name: Of the file in it.
        """
        self.folder = Path(folder)
        self.manifest = self.folder / name
        self._manifest: dict[str, Any] = {}

    def begin(self) -> None:
        """Write the manifest; one process does it, before any shard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_manifest()

    def write_manifest(self) -> None:
        """Write the manifest into a folder that is there."""
        write_renamed(self.manifest, lambda path: path.write_text(json.dumps(self._manifest, indent=2)))


class ScoreWriter(ManifestWriter):
    """Writes one cache; several jobs may add their roles to it one after the other."""

    def __init__(
        self,
        folder: str | Path,
        fingerprints: Mapping[str, str],
        teacher_weights: Mapping[str, str],
        n_pairs: int,
        pairs_per_shard: int,
    ) -> None:
        """Check a cache that is there, or make a new one in memory; ``begin`` writes it.

        Args:
            folder: The cache.
            fingerprints: Of everything but the weights, by the names in ``FINGERPRINTS``.
            teacher_weights: Fingerprint of the weights of each role that this job scores.
            n_pairs: Pairs of the data.
            pairs_per_shard: Pairs a shard.

        Raises:
            InputError: The cache that is there was computed from something else.
        """
        super().__init__(folder, _MANIFEST)
        self.n_shards = -(-n_pairs // pairs_per_shard)
        self._manifest = {
            "format": _FORMAT,
            "pairs": n_pairs,
            "pairs_per_shard": pairs_per_shard,
            "shards": self.n_shards,
            "fingerprints": {name: fingerprints[name] for name in FINGERPRINTS},
            "teacher_weights": dict(teacher_weights),
        }
        if self.manifest.exists():
            there = read_manifest(self.folder)
            for field in ("pairs", "pairs_per_shard"):
                _compare(self.folder, field, there[field], self._manifest[field])
            _compare_fingerprints(self.folder, there["fingerprints"], self._manifest["fingerprints"])
            for role, weights in teacher_weights.items():
                _compare(self.folder, f"teacher_weights.{role}", there["teacher_weights"].get(role, weights), weights)
            self._manifest["teacher_weights"] = {**there["teacher_weights"], **teacher_weights}
        elif any(self.folder.glob("*.parquet")):
            found = f"shards without {_MANIFEST}, which says what they are scores of"
            raise InputError(str(self.folder), found, "a score cache, or an empty folder")

    def missing(self, roles: Iterable[str]) -> list[int]:
        """Shards that are not there for every one of the roles."""
        roles = list(roles)
        return [
            shard
            for shard in range(self.n_shards)
            if not all(_shard_path(self.folder, role, shard).exists() for role in roles)
        ]

    def write(self, role: str, shard: int, pairs: Sequence[PairScores]) -> None:
        """Write one shard of one role.

        Raises:
            InputError: A score is not finite, or a log-prob above 0.
        """
        path = _shard_path(self.folder, role, shard)
        rows = [pair.row for pair in pairs]
        table = pa.table(
            {
                "pair_id": [pair.pair_id for pair in pairs],
                "chosen": [pair.chosen for pair in pairs],
                "rejected": [pair.rejected for pair in pairs],
                NUMBER: rows,
            },
            schema=_SCHEMA,
        )
        if None in rows:
            table = table.drop_columns([NUMBER])
        check_scores(str(path), table, ROLES[role].margin_of is None)
        write_renamed(path, lambda writing: pq.write_table(with_sums(table), writing))


class ScoreReader:
    """Scores of pairs, with the importance weights that a method makes of them; goes to dataloader workers.

    Attributes:
        fingerprint: A name for what the scores were computed from, weights of the teachers included.
        of_numbers: They are of the pairs of the data that was scored, and of no other.
    """

    of_numbers = True

    def __init__(
        self,
        folder: str | Path,
        fingerprints: Mapping[str, str],
        teacher_weights: Mapping[str, str],
        method: WeightedConfig | None = None,
        seed: int = 0,
        more: Sequence[str | Path] = (),
        shared_ids: frozenset[str] = frozenset(),
    ) -> None:
        """Open a cache and check that it belongs to a run.

        Args:
            folder: The cache.
            fingerprints: What the run would compute the scores from, by the names in ``FINGERPRINTS``.
            teacher_weights: Fingerprint of the weights of each role whose folder the run names; the weights
                themselves need not be there to train.
            method: How to weigh spans; ``None`` for weights of 1 (DPO).
            seed: Of the run, for weights that are drawn.
            more: Other caches, for roles that the first does not hold.
            shared_ids: Ids that several pairs of the data have.

        Raises:
            InputError: No cache, a role or shard that is missing, scores of something else, or what cannot be a score.
        """
        self.folder = Path(folder)
        weighting = Weighting() if method is None else method.weighting(seed)
        self._weighting = replace(weighting, shared_ids=shared_ids)
        self._roles = ("reference",) if method is None else method.roles()
        manifests = {place: read_manifest(place) for place in (self.folder, *map(Path, more))}
        for place, manifest in manifests.items():
            _compare_fingerprints(place, manifest["fingerprints"], fingerprints)
        self._folders: dict[str, Path] = {}
        self._tables: dict[str, pa.Table] = {}
        digests = []
        # The first cache is the last to write over where a role is from.
        holder = {role: place for place in reversed(manifests) for role in manifests[place]["teacher_weights"]}
        for role in self._roles:
            if role not in holder:
                need = "method.weights" if role in self._weighting.roles else "the reference"
                raise InputError(f"{self.folder}/{_MANIFEST}", f"roles {sorted(holder)}", f"{role}, for {need}")
            place = holder[role]
            weights = manifests[place]["teacher_weights"][role]
            _compare(place, f"teacher_weights.{role}", weights, teacher_weights.get(role, weights))
            digests.append(weights)
            self._folders[role] = place
            self._tables[role] = self._read_role(role, manifests[place]["shards"])
        self.fingerprint = _digest([manifests[self.folder]["fingerprints"], digests])
        self._by_number, self._rows = rows_of_pairs(self._tables)
        check_tables(self._folders, self._tables, self._rows)

    def _read_role(self, role: str, n_shards: int) -> pa.Table:
        tables, folder = [], self._folders[role]
        for shard in range(n_shards):
            path = _shard_path(folder, role, shard)
            if not path.is_file():
                raise InputError(str(folder), f"no {path.name}", f"{n_shards} shards; finish scoring first")
            try:
                schema = pq.read_schema(path)
                known = [field for field in _SCHEMA if field.name != NUMBER or NUMBER in schema.names]
                check_size(path, [field.name for field in known])
                table = pq.read_table(path, schema=pa.schema(known))
            except InputError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                found = f"a shard that cannot be read ({error})"
                raise InputError(str(path), found, "a Parquet shard; remove it and score again") from error
            for name in table.column_names:
                if table[name].null_count:
                    raise InputError(str(path), f"{table[name].null_count} rows without {name}", "scores in every row")
            check_sums(str(path), table, schema)
            check_scores(str(path), table, ROLES[role].margin_of is None)
            tables.append(table)
        if not all(NUMBER in table.column_names for table in tables):
            # A cache that an earlier version began: then its ids differ.
            tables = [table.select([name for name in _SCHEMA.names if name != NUMBER]) for table in tables]
        return pa.concat_tables(tables).combine_chunks()

    def __len__(self) -> int:
        return len(self._rows[self._roles[0]])

    def holds(self, pair_id: str, row: int) -> bool:
        """Whether there are scores of a pair, given its id and its number in the data."""
        return (row if self._by_number else pair_id) in self._rows[self._roles[0]]

    def pair_scores(self, pair_id: str, row: int) -> dict[str, PairScores]:
        """Scores of a pair in each role that the method asks for, its reference first.

        Args:
            pair_id: What the user calls the pair.
            row: Its number in the data.

        Raises:
            InputError: The cache does not hold the pair, or roles have other numbers of spans.
        """
        scored = {role: self._pair(role, pair_id, row) for role in self._roles}
        spans = {role: _numbers(scores) for role, scores in scored.items()}
        expected = spans[self._roles[0]]
        for role, found in spans.items():
            if found != expected:
                place = f"{self._folders[role]}, {role}, pair {pair_id!r}"
                raise InputError(place, f"{found} spans", f"{expected}, as the reference has")
        return scored

    def lookup(self, pair: EncodedPair) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
        """Reference log-probs of chosen and rejected, then importance weights of both; f32 ``[n_spans]`` each.

        Raises:
            InputError: As of ``pair_scores``; there are not as many scores as spans, or a weight is not finite.
        """
        scored = self.pair_scores(pair.id, pair.index)
        reference = scored[self._roles[0]]
        expected = [pair.chosen.n_spans, pair.rejected.n_spans]
        if _numbers(reference) != expected:
            place = f"{self._folders[self._roles[0]]}, {self._roles[0]}, pair {pair.id!r}"
            raise InputError(place, f"{_numbers(reference)} spans", f"{expected}, as the responses have")
        both = {role: (scores.chosen, scores.rejected) for role, scores in scored.items()}
        weights = self._weighting.pair_weights(both, pair)
        self._check_weights(pair.id, weights)
        return reference.chosen, reference.rejected, *weights

    def _check_weights(self, pair_id: str, weights: Sequence[Float32Array]) -> None:
        for name, response in zip(("chosen", "rejected"), weights, strict=True):
            if not np.isfinite(response).all():
                at = int(np.flatnonzero(~np.isfinite(response))[0])
                place = f"{self.folder}, weights {self._weighting.name} of pair {pair_id!r}, {name}, span {at}"
                expected = "a finite weight; are method.weight_scale, weight_lower and weight_upper sound?"
                raise InputError(place, str(response[at]), expected)

    def _pair(self, role: str, pair_id: str, number: int) -> PairScores:
        row = self._rows[role].get(number if self._by_number else pair_id)
        if row is None:
            raise InputError(
                f"{self._folders[role]}, {role}", f"no pair {pair_id!r}", "scores of every pair of the data"
            )
        table = self._tables[role]
        if (other := table["pair_id"][row].as_py()) != pair_id:
            place = f"{self._folders[role]}, {role}, pair {pair_id!r}"
            raise InputError(place, f"scores of pair {other!r}", "those of this one; remove the cache and score again")
        chosen, rejected = (
            table[name][row].values.to_numpy(zero_copy_only=False).astype(np.float32) for name in ("chosen", "rejected")
        )
        return PairScores(pair_id, chosen, rejected, number)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        InputError: There is none, or it is of another format.
    """
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise InputError(str(folder), f"no {_MANIFEST}", "a span score cache, written by tools/score.py")
    manifest = read_object(path, "the manifest of a score cache")
    if manifest.get("format") != _FORMAT:
        raise InputError(str(path), f"format {manifest.get('format')!r}", f"format {_FORMAT}")
    for field, kind in _FIELDS.items():
        value = manifest.get(field)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{path}, {field}", repr(value), f"a value of type {kind.__name__}")
    pairs, per_shard = manifest["pairs"], manifest["pairs_per_shard"]
    if pairs < 1 or per_shard < 1 or manifest["shards"] != -(-pairs // per_shard):
        found = f"{manifest['shards']} shards of {per_shard} for {pairs} pairs"
        raise InputError(str(path), found, "numbers that belong together")
    for role in manifest["teacher_weights"]:
        if not role.isidentifier():
            raise InputError(f"{path}, teacher_weights", repr(role), "roles, which are parts of file names")
    return manifest


def is_whole(folder: str | Path) -> bool:
    """Whether every shard is there of every role that the manifest names."""
    manifest = read_manifest(folder)
    shards = range(manifest["shards"])
    return all(_shard_path(Path(folder), role, n).exists() for role in manifest["teacher_weights"] for n in shards)


def _compare_fingerprints(folder: Path, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name in FINGERPRINTS:
        _compare(folder, name, there.get(name), here[name])


def _compare(folder: Path, field: str, there: object, here: object) -> None:
    if there != here:
        raise InputError(f"{folder}/{_MANIFEST}, {field}", f"{there}", f"{here}, as this run has it")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _numbers(scores: PairScores) -> list[int]:
    """Spans of chosen and rejected."""
    return [len(scores.chosen), len(scores.rejected)]


def _shard_path(folder: Path, role: str, shard: int) -> Path:
    return folder / f"{role}-{shard:05d}.parquet"


def write_renamed(path: Path, write: Any) -> None:
    # Not the number of the process: in containers and on other nodes another job may have the same.
    writing = path.with_name(path.name + f".writing-{uuid.uuid4().hex[:12]}")
    try:
        with naming(path):
            write(writing)
            flush(writing)
            os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)
