"""Writing an encoded dataset: worker processes encode a shard each."""

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.encoded import (
    ARRAYS,
    CHECKS,
    MANIFEST,
    RECORD,
    SIDES,
    Manifest,
    checksum,
    flags_of,
    shard_folder,
    shared_prompt,
    verify_shard,
    without_own_prompt,
)
from ctpd_nemo.data.encoded_pair import SKIP_REASONS, EncodedPair, EncodedResponse, Skipped
from ctpd_nemo.data.source import PairSource
from ctpd_nemo.data.workers import WorkerLoader
from ctpd_nemo.errors import InputError

# Pairs that are tokenized together.
_CHUNK = 32


def write_encoded(
    folder: str | Path, manifest: Manifest, source: PairSource, num_workers: int
) -> Iterator[tuple[int, int]]:
    """Make an encoded dataset, or complete one; shards that are there are checked and kept.

    A shard is written under a temporary name and renamed, so one that is there is whole. Jobs that write the same
    dataset at once write the same files, and do not disturb each other.

    Args:
        folder: The dataset.
        manifest: What it is made from.
        source: Encodes the pairs.
        num_workers: Processes that encode; 0 does it in this one.

    Yields:
        After each shard how many are done, and how many there are to be.

    Raises:
        InputError: The folder holds something else, is damaged or cannot be written; a row or template is bad.
    """
    folder = Path(folder)
    _begin(folder, manifest)
    there = [shard for shard in range(manifest.n_shards) if shard_folder(folder, shard).exists()]
    for done, shard in enumerate(there, start=1):
        verify_shard(folder, shard)
        yield done, manifest.n_shards
    missing = sorted(set(range(manifest.n_shards)) - set(there))
    shards: WorkerLoader[int] = WorkerLoader(
        _Shards(folder, manifest, source),  # type: ignore[arg-type]
        sampler=missing,
        batch_size=None,
        num_workers=min(num_workers, len(missing)),
    )
    for done, _ in enumerate(shards, start=len(there) + 1):
        yield done, manifest.n_shards


def _begin(folder: Path, manifest: Manifest) -> None:
    """Make the folder and its manifest, or compare what is there."""
    if (folder / MANIFEST).exists() or any(folder.glob("shard-*")):
        manifest.check(folder)
        return
    writing = _writing(folder / MANIFEST)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writing.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        writing.replace(folder / MANIFEST)
    except OSError as error:
        raise InputError(str(folder), str(error.strerror), "a folder that can be written") from error


def _writing(target: Path) -> Path:
    """A temporary name that nobody else uses: a job in another container may have the same process number."""
    return target.with_name(f"{target.name}.writing-{uuid.uuid4().hex[:12]}")


class _Shards:
    """Shards by number; making one writes it."""

    def __init__(self, folder: Path, manifest: Manifest, source: PairSource) -> None:
        self._folder = folder
        self._manifest = manifest
        self._source = source

    def prepare(self) -> None:
        self._source.prepare(lengths=False)

    def __getitem__(self, shard: int) -> int | InputError:
        target = shard_folder(self._folder, shard)
        writing = _writing(target)
        try:
            arrays = self._arrays(self._manifest.rows(shard))
            # What a file says now may not be what the manifest knows it by.
            self._source.check_unchanged()
            writing.mkdir()
            for name, array in arrays.items():
                np.save(writing / f"{name}.npy", array, allow_pickle=False)
            checks = {name: checksum(writing / f"{name}.npy") for name in arrays}
            (writing / CHECKS).write_text(json.dumps(checks) + "\n", encoding="utf-8")
            # Where another job was first this fails, and its shard is the same.
            if not target.exists():
                writing.rename(target)
        except InputError as error:
            return error
        except OSError as error:
            if not target.exists():
                # NumPy says in words of its own, and without a number, that a file could not grow.
                return InputError(str(writing), error.strerror or str(error), "a folder that can be written")
        finally:
            shutil.rmtree(writing, ignore_errors=True)
        return shard

    def _arrays(self, rows: range) -> dict[str, NDArray[Any]]:
        index = np.zeros(len(rows), dtype=RECORD)
        tokens: list[NDArray[np.int32]] = []
        ids: list[bytes] = []
        tokens_at = id_at = 0
        chunks = (rows[begin : begin + _CHUNK] for begin in range(0, len(rows), _CHUNK))
        pairs = [pair for chunk in chunks for pair in self._source.pairs(chunk)]
        for record, pair in zip(index, pairs, strict=True):
            parts = _fill(record, pair, 1 if self._manifest.one_sided else 2)
            tokens += parts
            ids.append(pair.id.encode())
            record["tokens_at"], record["id_at"], record["id_bytes"] = tokens_at, id_at, len(ids[-1])
            tokens_at += sum(map(len, parts))
            id_at += len(ids[-1])
        flat = {
            "tokens": np.concatenate([np.empty(0, dtype=np.int32), *tokens]),
            "ids": np.frombuffer(b"".join(ids), dtype="u1"),
        }
        return {"index": index, **{name: array.astype(ARRAYS[name]) for name, array in flat.items()}}


def _fill(record: Any, pair: EncodedPair | Skipped, n_sides: int) -> list[NDArray[Any]]:
    """Write a pair's lengths into its record; its parts, in the order in which ``EncodedDataset`` reads them."""
    if isinstance(pair, Skipped):
        record["skipped"] = 1 + SKIP_REASONS.index(pair.reason)
        return []
    responses: tuple[EncodedResponse, ...] = (pair.chosen, pair.rejected)
    both = [[response.side(name) for response in responses] for name in SIDES]
    prompts = [shared_prompt(*tokens) for tokens in both]
    sides = [
        [without_own_prompt(tokens[number], len(prompt)) for tokens, prompt in zip(both, prompts, strict=True)]
        for number in range(len(responses))
    ]
    record["prompt"] = [len(prompt) for prompt in prompts]
    record["response"] = [[len(tokens.response_ids) for tokens in row] for row in sides]
    record["bounds"] = [len(response.bounds) for response in responses]
    record["spans"] = [response.n_spans for response in responses]
    record["truncated"] = [flags_of(response) for response in responses]
    parts = prompts[:n_sides]
    for response, row in zip(responses, sides, strict=True):
        parts += [part for tokens in row[:n_sides] for part in (tokens.response_ids, tokens.response_span)]
        parts.append(response.bounds.astype(np.int32))
    return parts
