"""Encoded pairs on disk: tokenized and aligned once, memory-mapped ever after.

A folder with a manifest, and a folder for each shard, which holds a fixed range of rows::

    manifest.json
    shard-00000/index.npy     a record a row: where its parts lie, and how long they are
    shard-00000/tokens.npy    int32: ids, spans and bounds of all rows, one after the other
    shard-00000/ids.npy       uint8: the ids of all pairs in UTF-8, one after the other
    shard-00000/checks.json   CRC-32 of the three

Which pairs share a microbatch depends on the seed, the batch size and the layout, so that is left to the loader.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import (
    DIFFERENCES,
    SKIP_REASONS,
    EncodedPair,
    EncodedResponse,
    Responses,
    SideName,
    SideTokens,
    Skipped,
)
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

FORMAT = 1
PAIRS_PER_SHARD = 1024
MANIFEST = "manifest.json"
CHECKS = "checks.json"
SIDES: tuple[SideName, ...] = ("policy", "reference")
# Lengths by side, by response, or by response and side; ``skipped`` is 0, or counts in SKIP_REASONS from 1. The lowest
# bit of ``truncated`` says whether a response is, those above it which of DIFFERENCES it has.
RECORD = np.dtype(
    [
        ("tokens_at", "<i8"),
        ("id_at", "<i8"),
        ("id_bytes", "<i4"),
        ("skipped", "<i4"),
        ("prompt", "<i4", (2,)),
        ("response", "<i4", (2, 2)),
        ("bounds", "<i4", (2,)),
        ("spans", "<i4", (2,)),
        ("truncated", "<i4", (2,)),
    ]
)
ARRAYS = {"index": RECORD, "tokens": np.dtype("<i4"), "ids": np.dtype("u1")}


@dataclass(frozen=True)
class Manifest:
    """What an encoded dataset was made from.

    Attributes:
        pairs: Rows.
        one_sided: Both sides read alike, and are written once.
        fingerprints: Of everything that the tokens depend on, by name.
        pairs_per_shard: Rows of a shard; the last one may have fewer.
        format: Of the files.
    """

    pairs: int
    one_sided: bool
    fingerprints: dict[str, str]
    pairs_per_shard: int
    format: int = FORMAT

    @classmethod
    def of(cls, dataset: PreferenceDataset, encoder: PairEncoder, pairs_per_shard: int = PAIRS_PER_SHARD) -> "Manifest":
        """What a run would encode."""
        sides = dict(zip(SIDES, (encoder.policy, encoder.reference), strict=True))
        return cls(
            pairs=len(dataset),
            one_sided=encoder.one_sided,
            pairs_per_shard=pairs_per_shard,
            fingerprints={
                "data": dataset.fingerprint,
                **{f"{name}_tokenizer": side.tokenizer_fingerprint for name, side in sides.items()},
                **{f"{name}_template": side.template_fingerprint for name, side in sides.items()},
                "lengths": encoder.lengths,
            },
        )

    @property
    def n_shards(self) -> int:
        """How many shards there are."""
        return -(-self.pairs // self.pairs_per_shard)

    @property
    def name(self) -> str:
        """A folder name that only equal manifests share."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.pairs_per_shard, min((shard + 1) * self.pairs_per_shard, self.pairs))

    def check(self, folder: Path) -> None:
        """Compare with what a folder says that it is.

        Raises:
            InputError: No manifest, none of this format, or one of something else; names the first field that differs.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise InputError(str(folder), f"no {MANIFEST}", "an encoded dataset, or an empty folder")
        there = read_object(path, f"the manifest of an encoded dataset; remove {folder} to encode again")
        fingerprints = there.get("fingerprints")
        fields = {**there, **(fingerprints if isinstance(fingerprints, dict) else {})}
        here = asdict(self)
        for name, value in {**here, **here.pop("fingerprints")}.items():
            if name != "fingerprints" and fields.get(name) != value:
                raise InputError(f"{path}, {name}", f"{fields.get(name)}", f"{value}, as this run has it")


def shard_folder(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{shard:05d}"


class EncodedDataset:
    """An encoded dataset as a source of pairs; files are mapped when a process first asks for a row of them."""

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        """Open a dataset that is complete.

        Args:
            folder: The dataset.
            manifest: What it must have been made from.

        Raises:
            InputError: It was made from something else, a shard is missing, or its files are not what they should be.
        """
        self.folder = Path(folder)
        self.manifest = manifest
        manifest.check(self.folder)
        for shard in range(manifest.n_shards):
            if not shard_folder(self.folder, shard).is_dir():
                raise InputError(str(self.folder), f"no {shard_folder(self.folder, shard).name}", "every shard")
        self._shards: dict[int, dict[str, NDArray[Any]]] = {}
        for shard in range(manifest.n_shards):
            self._arrays(shard)

    def __len__(self) -> int:
        return self.manifest.pairs

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": {}}

    @cached_property
    def skipped(self) -> Counter[str]:
        """Pairs left out, by reason."""
        reasons = np.concatenate([self._shard(shard)["index"]["skipped"] for shard in range(self.manifest.n_shards)])
        numbers, counts = np.unique(reasons[reasons > 0], return_counts=True)
        return Counter(
            {SKIP_REASONS[number - 1]: count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}
        )

    def first_skipped(self, reason: str) -> int:
        """The first pair that is left out for a reason which some have."""
        wanted = 1 + SKIP_REASONS.index(reason)
        for shard in range(self.manifest.n_shards):
            found = np.flatnonzero(self._shard(shard)["index"]["skipped"] == wanted)
            if len(found):
                return self.manifest.rows(shard)[int(found[0])]
        raise ValueError(reason)

    def prepare(self, lengths: bool) -> None:
        """Nothing is to be built."""

    def check_unchanged(self) -> None:
        """The files are the dataset's own."""

    def pairs(self, rows: Sequence[int]) -> list[EncodedPair | Skipped]:
        """The pairs of some rows, in order; their arrays are views of the files.

        Raises:
            InputError: A file cannot be read.
        """
        return [self._pair(row) for row in rows]

    def lengths(
        self, rows: Sequence[int], side: SideName, responses: Responses
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of each sequence, and those of its response, int64 ``[n, responses]``; 0 for a pair left out."""
        shard_of, within = np.divmod(np.asarray(rows, dtype=np.int64), self.manifest.pairs_per_shard)
        records = np.empty(len(rows), dtype=RECORD)
        for shard in np.unique(shard_of).tolist():
            own = shard_of == shard
            records[own] = self._shard(shard)["index"][within[own]]
        number = SIDES.index(side)
        response_PR = records["response"][:, : len(responses), number].astype(np.int64)
        return records["prompt"][:, number, None] + response_PR, response_PR

    def _shard(self, shard: int) -> dict[str, NDArray[Any]]:
        if shard not in self._shards:
            self._shards[shard] = self._arrays(shard)
        return self._shards[shard]

    def _arrays(self, shard: int) -> dict[str, NDArray[Any]]:
        arrays = {name: self._map(shard, name) for name in ARRAYS}
        self._check_index(shard, arrays)
        return arrays

    def _map(self, shard: int, name: str) -> NDArray[Any]:
        path = shard_folder(self.folder, shard) / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise _damaged(path, f"a file that cannot be mapped ({error})") from error
        rows = len(self.manifest.rows(shard))
        if array.dtype != ARRAYS[name] or array.ndim != 1 or (name == "index" and len(array) != rows):
            found = f"{array.dtype} of shape {array.shape}"
            raise _damaged(path, found, f"{ARRAYS[name]}" + (f" of shape ({rows},)" if name == "index" else ""))
        # Slices of a plain array are made faster than those of a memmap, and keep the file mapped as well.
        return array.view(np.ndarray)

    def _check_index(self, shard: int, arrays: dict[str, NDArray[Any]]) -> None:
        """No record points out of its shard: a slice that does would be short, and nobody would notice."""
        index, n_sides = arrays["index"], 1 if self.manifest.one_sided else 2
        kept = index[index["skipped"] == 0]
        lengths_R = (
            kept["prompt"][:, :n_sides].sum(axis=1, dtype=np.int64)
            + 2 * kept["response"][:, :, :n_sides].sum(axis=(1, 2), dtype=np.int64)
            + kept["bounds"].sum(axis=1, dtype=np.int64)
        )
        parts = ("prompt", "response", "bounds", "spans", "id_bytes", "id_at", "tokens_at", "skipped")
        if (
            any((index[name] < 0).any() for name in parts)
            or (index["skipped"] > len(SKIP_REASONS)).any()
            or (index["id_at"] > len(arrays["ids"]) - index["id_bytes"]).any()
            or (kept["tokens_at"] > len(arrays["tokens"]) - lengths_R).any()
        ):
            path = shard_folder(self.folder, shard) / "index.npy"
            raise _damaged(path, "a record that points out of its shard")

    def _pair(self, row: int) -> EncodedPair | Skipped:
        shard, within = divmod(int(row), self.manifest.pairs_per_shard)
        arrays = self._shard(shard)
        record = arrays["index"][within]
        id_bytes = arrays["ids"][record["id_at"] : record["id_at"] + record["id_bytes"]].tobytes()
        pair_id = id_bytes.decode(errors="replace")
        if record["skipped"]:
            return Skipped(int(row), pair_id, SKIP_REASONS[record["skipped"] - 1])
        parts = _parts(arrays["tokens"], record, 1 if self.manifest.one_sided else 2)
        prompts = [next(parts) for _ in range(1 if self.manifest.one_sided else 2)]
        responses = []
        for number in range(2):
            sides = [_with_own_prompt(SideTokens(prompt, next(parts), next(parts))) for prompt in prompts]
            flags = int(record["truncated"][number])
            responses.append(
                EncodedResponse(
                    sides[0],
                    sides[-1],
                    next(parts).astype(np.int64),
                    int(record["spans"][number]),
                    bool(flags & 1),
                    tuple(name for bit, name in enumerate(DIFFERENCES, start=1) if flags >> bit & 1),
                )
            )
        return EncodedPair(int(row), pair_id, *responses)


def _parts(tokens: NDArray[np.int32], record: Any, n_sides: int) -> Iterator[NDArray[np.int32]]:
    """The parts of a row in the order they lie in: prompts; then for each response ids and spans by side, bounds."""
    lengths = record["prompt"][:n_sides].tolist()
    for response, bounds in zip(record["response"], record["bounds"], strict=True):
        lengths += [length for side in response[:n_sides].tolist() for length in (side, side)] + [int(bounds)]
    at = int(record["tokens_at"])
    for length in lengths:
        yield tokens[at : at + length]
        at += length


def flags_of(response: EncodedResponse) -> int:
    """What ``truncated`` of a record says of a response."""
    bits = [1 << DIFFERENCES.index(name) + 1 for name in response.differences]
    return int(response.truncated) + sum(bits)


def shared_prompt(first: SideTokens, second: SideTokens) -> NDArray[np.int32]:
    """The tokens that the prompts of a pair's responses begin with alike: mostly all of them."""
    if first.prompt_ids is second.prompt_ids:
        return first.prompt_ids
    shorter = min(len(first.prompt_ids), len(second.prompt_ids))
    differs = np.flatnonzero(first.prompt_ids[:shorter] != second.prompt_ids[:shorter])
    return first.prompt_ids[: differs[0] if len(differs) else shorter]


def without_own_prompt(tokens: SideTokens, shared: int) -> SideTokens:
    """The same with what its prompt has beyond the shared part in front of the response, in no span."""
    own = tokens.prompt_ids[shared:]
    if not len(own):
        return tokens
    return SideTokens(
        tokens.prompt_ids[:shared],
        np.concatenate([own, tokens.response_ids]),
        np.concatenate([np.full(len(own), -1, dtype=np.int32), tokens.response_span]),
    )


def _with_own_prompt(tokens: SideTokens) -> SideTokens:
    """The inverse of ``without_own_prompt``."""
    if not len(tokens.response_span) or tokens.response_span[0] >= 0:
        return tokens
    own = int(np.argmax(tokens.response_span >= 0))
    prompt = np.concatenate([tokens.prompt_ids, tokens.response_ids[:own]])
    return SideTokens(prompt, tokens.response_ids[own:], tokens.response_span[own:])


def verify_shard(folder: Path, shard: int) -> None:
    """Read a whole shard and compare it with its checksums.

    Raises:
        InputError: It is damaged.
    """
    folder = shard_folder(folder, shard)
    expected = read_object(folder / CHECKS, f"checksums; remove {folder} to encode it again")
    for name in ARRAYS:
        if not isinstance(expected.get(name), int):
            raise _damaged(folder / CHECKS, f"{name} = {expected.get(name)!r}", "a checksum")
    for name in ARRAYS:
        path = folder / f"{name}.npy"
        try:
            found = checksum(path)
        except OSError as error:
            raise _damaged(path, f"a file that cannot be read ({error.strerror})") from error
        if found != expected[name]:
            raise _damaged(path, f"CRC-32 {found:08x}", f"{expected[name]:08x}")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            total = zlib.crc32(chunk, total)
    return total


def _damaged(path: Path, found: str, expected: str = "a whole file") -> InputError:
    return InputError(str(path), found, f"{expected}; remove {path.parent} to encode it again")
