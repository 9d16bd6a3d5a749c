"""The index of a checkpoint: which tensors and objects there are, and where their bytes are.

``.metadata`` is a pickle of records of ``torch.distributed.checkpoint``, whose names in torch 2.8 to 2.13 are here. It
is read by rules, and what it says is copied, field by field, into records that are made here: each of its exact type,
each number in its range, and all of it against the files. An index can claim no more than they hold.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_archives import TENSOR_NAMES
from ctpd_nemo.parallel.checkpoint_pickles import Call, Names, Record, read_pickle, records, refusal, whole_numbers

# What ``torch.save`` writes beside the bytes of a tensor: some 1,600, and room up to the next multiple of 64.
_LARGEST_FRAME = 2**16
# All objects together are held in memory; random states and FP8 scales have some kilobytes each.
_LARGEST_OBJECTS = 2**28
# There are some 150 for each piece of a tensor; so many take less than a minute and 3 GB.
_MOST_OPERATIONS = 32_000_000
_SMALL = 2**20
_MOST = 2**48
_MOST_DIMS = 5

_RECORDS = "torch.distributed.checkpoint."


def _only(expected: tuple[Any, ...], made: Any) -> Call:
    def make(arguments: tuple[Any, ...]) -> Any:
        if arguments != expected:
            raise ValueError(f"anything but {expected}")
        return made

    return Call(make)


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = arguments
    return whole_numbers(sizes, _MOST)


_NAMES: Names = {
    **{name: value for name, value in TENSOR_NAMES.items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): Call(_size),
    ("torch.serialization", "_get_layout"): _only(("torch.strided",), torch.strided),
    ("collections", "OrderedDict"): TENSOR_NAMES["collections", "OrderedDict"],
    **records(
        f"{_RECORDS}metadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    **records(f"{_RECORDS}filesystem", "_StorageInfo", "_StoragePrefix"),
    # How the writers shared the work out; nothing here asks for it.
    **records(f"{_RECORDS}planner", "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}


@dataclass(frozen=True)
class Entry:
    """Where the bytes of a piece of a tensor, or of an object, are.

    Attributes:
        file: Its name in the checkpoint's folder.
        offset: The first byte.
        length: In bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Attributes:
        metadata: As torch's planners take it: tensors with their pieces, and objects.
        entries: Where each of them is, by key and, for a piece of a tensor, its place in it.
        pieces: The sizes of each piece of a tensor, likewise.
    """

    metadata: Metadata
    entries: dict[MetadataIndex, Entry]
    pieces: dict[MetadataIndex, torch.Size]


def read_index(content: bytes, place: str, files: Mapping[str, int]) -> Index:
    """The index that the bytes of ``.metadata`` hold.

    Args:
        content: All of them.
        place: For errors.
        files: The files of the checkpoint, and how many bytes each has.

    Raises:
        InputError: It asks for anything but its records, is damaged, or claims what the files do not hold.
    """
    # Each piece of a tensor has 1,600 bytes in the files beside its elements, and 400 in the index.
    if len(content) > _SMALL + sum(files.values()) - len(content):
        raise refusal(place, f"an index of {len(content):,} bytes for files of fewer")
    return _Reader(place, files).read(read_pickle(content, place, _NAMES, most=_MOST_OPERATIONS))


class _Reader:
    """Copies what is valid of an index."""

    def __init__(self, place: str, files: Mapping[str, int]) -> None:
        self._place = place
        self._files = files
        self._pieces = 0
        self._object_bytes = 0

    def read(self, root: Any) -> Index:
        state = self._state(root, "Metadata")
        known = {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
        # Lists of what each rank wrote, from Megatron-Core; a checkpoint is read without them.
        if (unknown := state.keys() - known - {"all_local_plans", "mcore_data"}) or state.get("planner_data"):
            raise self._refusal(f"an index with {', '.join(sorted(map(repr, unknown))) or 'planner_data'}")
        entries = self._entries(self._typed(state, "storage_data", dict))
        stored = {
            key: self._stored(key, record, entries)
            for key, record in self._typed(state, "state_dict_metadata", dict).items()
            if self._is(key, str)
        }
        if len(entries) != self._pieces:
            raise self._refusal("an index with places of what it does not list")
        self._check_overlaps(list(entries.values()))
        pieces = {
            MetadataIndex(key, chunk.offsets): chunk.sizes
            for key, described in stored.items()
            if isinstance(described, TensorStorageMetadata)
            for chunk in described.chunks
        }
        return Index(Metadata(stored), entries, pieces)

    def _refusal(self, found: str) -> InputError:
        return refusal(self._place, found)

    def _is(self, value: Any, kind: type) -> bool:
        """True; anything else than a value of exactly this type is refused."""
        if type(value) is not kind:
            raise self._refusal(f"an index with a {type(value).__name__} for a {kind.__name__}")
        return True

    def _state(self, record: Any, kind: str) -> dict[str, Any]:
        """The fields of a record of torch's, which are those that it has."""
        self._is(record, Record)
        if record.kind != kind or record.arguments or not self._is(record.state, dict):
            raise self._refusal(f"an index with a {record.kind} for a {kind}")
        return record.state

    def _typed(self, state: dict[str, Any], name: str, kind: type) -> Any:
        self._is(state.get(name), kind)
        return state[name]

    # Entries

    def _entries(self, storage: dict[Any, Any]) -> dict[MetadataIndex, Entry]:
        entries: dict[MetadataIndex, Entry] = {}
        for key, record in storage.items():
            state = self._state(key, "MetadataIndex")
            offset = state.get("offset")
            index = MetadataIndex(
                self._typed(state, "fqn", str),
                None if offset is None else self._numbers(offset, _MOST_DIMS),
            )
            if index in entries:
                raise self._refusal(f"an index with two places of {index.fqn}")
            entries[index] = self._entry(index.fqn, self._state(record, "_StorageInfo"))
        return entries

    def _entry(self, key: str, state: dict[str, Any]) -> Entry:
        if state.get("transform_descriptors") is not None:
            raise self._refusal(f"{key} with transform_descriptors, which would change its bytes as they are read")
        name = self._typed(state, "relative_path", str)
        if name not in self._files:
            raise InputError(self._place, f"{key} in {name!r}", "names of files in the same folder, by its manifest")
        entry = Entry(name, self._typed(state, "offset", int), self._typed(state, "length", int))
        if not 0 <= entry.offset <= entry.offset + entry.length <= self._files[name]:
            found = f"{key} in {entry.length:,} bytes at byte {entry.offset:,} of {name}"
            raise InputError(self._place, found, f"places in its {self._files[name]:,} bytes")
        return entry

    def _check_overlaps(self, entries: list[Entry]) -> None:
        """Bytes that stood for two things would let an index claim more than there is."""
        entries.sort(key=lambda entry: (entry.file, entry.offset, entry.length))
        for first, second in itertools.pairwise(entries):
            if first.file == second.file and first.offset + first.length > second.offset:
                raise self._refusal(f"an index in which bytes of {first.file} stand for two things")

    # Tensors and objects

    def _stored(
        self, key: str, record: Any, entries: Mapping[MetadataIndex, Entry]
    ) -> TensorStorageMetadata | BytesStorageMetadata:
        self._is(record, Record)
        if record.kind == "BytesStorageMetadata":
            if record.arguments or record.state:
                raise self._refusal(f"an index that says more of {key} than that it is an object")
            self._object_bytes += self._entry_of(MetadataIndex(key), entries).length
            if self._object_bytes > _LARGEST_OBJECTS:
                raise self._refusal(f"objects of more than {_LARGEST_OBJECTS:,} bytes")
            return BytesStorageMetadata()
        state = self._state(record, "TensorStorageMetadata")
        dtype = self._dtype(state.get("properties"))
        size = self._numbers(state.get("size"), _MOST_DIMS)
        chunks = [self._chunk(chunk, len(size)) for chunk in self._typed(state, "chunks", list)]
        for chunk in chunks:
            needed = math.prod(chunk.sizes) * dtype.itemsize
            length = self._entry_of(MetadataIndex(key, chunk.offsets), entries).length
            if not needed <= length <= needed + _LARGEST_FRAME:
                found = f"{key}, of which {needed:,} bytes are in {length:,}"
                raise InputError(self._place, found, "pieces of tensors in as many bytes as they have")
        if not _are_all_of(size, chunks):
            raise self._refusal(f"pieces of {key} that are not all of it, each part once")
        return TensorStorageMetadata(TensorProperties(dtype), size, chunks)

    def _entry_of(self, index: MetadataIndex, entries: Mapping[MetadataIndex, Entry]) -> Entry:
        self._pieces += 1
        # Lists of pieces that stand in a pickle once may be named in it any number of times.
        if index not in entries or self._pieces > len(entries):
            raise self._refusal(f"an index without a place for {index.fqn}")
        return entries[index]

    def _dtype(self, record: Any) -> torch.dtype:
        """Of all that the properties of a tensor say; the rest is of its time in memory."""
        self._is(record, Record)
        if record.kind != "TensorProperties" or record.arguments or not self._is(record.state, tuple):
            raise self._refusal("an index with a tensor without properties")
        self._is(record.state[0] if record.state else None, torch.dtype)
        return record.state[0]

    def _chunk(self, record: Any, dims: int) -> ChunkStorageMetadata:
        state = self._state(record, "ChunkStorageMetadata")
        offsets, sizes = (self._numbers(state.get(name), dims) for name in ("offsets", "sizes"))
        if not len(offsets) == len(sizes) == dims:
            raise self._refusal("an index with a piece of other dimensions than its tensor")
        return ChunkStorageMetadata(offsets, sizes)

    def _numbers(self, value: Any, dims: int) -> torch.Size:
        self._is(value, tuple)
        if len(value) > dims:
            raise self._refusal(f"an index with {len(value)} dimensions")
        try:
            return torch.Size(whole_numbers(value, _MOST))
        except ValueError as error:
            raise self._refusal(f"an index with {error}") from error


def _are_all_of(size: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    """Whether boxes cover a whole tensor, and each of its elements once.

    How many boxes there are at a point is known from the steps of that number, which are at corners of boxes: one up
    where a box ends in none of the dimensions, or in an even number of them, one down at its other corners.
    """
    steps: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes, sign in [(torch.Size([0] * len(size)), size, -1), *((c.offsets, c.sizes, 1) for c in chunks)]:
        for ends in itertools.product((0, 1), repeat=len(size)):
            corner = tuple(offset + end * length for offset, length, end in zip(offsets, sizes, ends, strict=True))
            steps[corner] += -sign if sum(ends) % 2 else sign
    return not any(steps.values())
