"""Indexes that say what is not so, and ones whose records are not what they are taken for."""

import collections
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.hostile.checkpoints.family import Attack
from tests.hostile.checkpoints.payloads import Sets, make_directory, saved, saved_before_archives
from tests.hostile.checkpoints.places import (
    INDEX,
    OBJECT,
    WEIGHT,
    change_index,
    entry,
    read_index,
    replace,
    write_index,
)
from tests.hostile.checkpoints.run import SKIPPED

Change = Callable[[Metadata], Any]


def _change(change: Change) -> Callable[[Path, Path], None]:
    return lambda folder, canary: change_index(folder, change)


# Places


def _place(**changed: Any) -> Change:
    def change(index: Metadata) -> None:
        at, stored = entry(index, WEIGHT)
        index.storage_data[at] = _StorageInfo(**{**vars(stored), **changed})

    return change


def _moved_key(**changed: Any) -> Change:
    def change(index: Metadata) -> None:
        at, stored = entry(index, WEIGHT)
        del index.storage_data[at]
        index.storage_data[MetadataIndex(**{"fqn": at.fqn, "offset": at.offset, **changed})] = stored

    return change


def _same_bytes(index: Metadata) -> None:
    _, stored = entry(index, WEIGHT)
    at, _ = entry(index, "optimizer.state.exp_avg.decoder.final_layernorm.weight")
    index.storage_data[at] = stored


def _keys_of_none(index: Metadata) -> None:
    index.storage_data = {None: next(iter(index.storage_data.values())), **index.storage_data}


PLACES: dict[str, Change] = {
    "bytes before the beginning": _place(offset=-1),
    "bytes behind the end": _place(offset=2**40),
    "a negative number of bytes": _place(length=-5),
    "exabytes": _place(length=2**62),
    "a number of bytes beyond 64 bits": _place(length=2**2000),
    "a number of bytes of 20,000 bits": _place(length=2**20000),
    "a place that is true": _place(offset=True),
    "a place that is a fraction": _place(offset=0.0),
    "a place that is text": _place(offset="0"),
    "no place": _place(offset=None),
    "a file beside the folder": _place(relative_path="../step-00000001/__0_0.distcp"),
    "a file of the system": _place(relative_path="/etc/passwd"),
    "a device": _place(relative_path="/dev/zero"),
    "the folder itself": _place(relative_path="."),
    "no file": _place(relative_path=""),
    "a name that ends early": _place(relative_path="__0_0.distcp\0"),
    "a name that is a list": _place(relative_path=["__0_0.distcp"]),
    "the manifest": _place(relative_path="manifest.json"),
    "a transform": _place(transform_descriptors=["stream.zstd/1"]),
    "a transform that is none": _place(transform_descriptors=[]),
    "a transform that nobody knows": _place(transform_descriptors=("evil",)),
    "one place of two things": _same_bytes,
    "a piece elsewhere": _moved_key(offset=torch.Size([7])),
    "a piece nowhere": _moved_key(offset=None),
    "a piece of nothing": _moved_key(fqn="nothing"),
    "a place of nothing": _keys_of_none,
    "no places": lambda index: setattr(index, "storage_data", {}),
    "places that are a list": lambda index: setattr(index, "storage_data", list(index.storage_data.items())),
}

# Tensors


def _tensor(**changed: Any) -> Change:
    def change(index: Metadata) -> None:
        stored = index.state_dict_metadata[WEIGHT]
        index.state_dict_metadata[WEIGHT] = TensorStorageMetadata(**{**vars(stored), **changed})

    return change


def _box(*offsets_and_sizes: tuple[Any, Any]) -> Any:
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in offsets_and_sizes]


def _of_size(*size: int) -> Change:
    """A tensor that is one piece of this size."""

    def change(index: Metadata) -> None:
        at, stored = entry(index, WEIGHT)
        zeros = torch.Size([0] * len(size))
        del index.storage_data[at]
        index.storage_data[MetadataIndex(WEIGHT, zeros)] = stored
        _tensor(size=torch.Size(size), chunks=_box((zeros, size)))(index)

    return change


def _raw_state(state: Any) -> Change:
    """A tensor of the index whose attributes are what no dataclass has."""

    def change(index: Metadata) -> None:
        made = object.__new__(TensorStorageMetadata)
        index.state_dict_metadata[WEIGHT] = Sets((_new, (TensorStorageMetadata,)), state) if state else made

    return change


def _new(kind: type) -> Any:
    return kind.__new__(kind)


def _properties(value: Any) -> Change:
    return _tensor(properties=value)


TENSORS: dict[str, Change] = {
    "a tensor of petabytes": _of_size(2**50),
    "a tensor of petabytes in two dimensions": _of_size(2**25, 2**25),
    "a tensor whose size overflows": _of_size(2**32, 2**32),
    "a tensor whose size overflows to its own": _of_size(2**32, 2**31, 2**1, 24),
    "a tensor of nine dimensions": _of_size(*[1] * 8, 24),
    "a tensor of a thousand dimensions": _of_size(*[1] * 1000),
    "a tensor in another shape": _of_size(4, 6),
    "a tensor of fewer elements": _of_size(23),
    "a tensor of no pieces": _tensor(chunks=[]),
    "a tensor of half its pieces": _tensor(chunks=_box(([0], [12]))),
    "a tensor of one piece twice": _tensor(chunks=_box(([0], [24]), ([0], [24]))),
    "a tensor of pieces over each other": _tensor(chunks=_box(([0], [24]), ([12], [12]))),
    "a tensor of a piece beyond it": _tensor(chunks=_box(([0], [25]))),
    "a tensor of a piece of two dimensions": _tensor(chunks=_box(([0, 0], [24, 1]))),
    "a tensor of a piece of no dimension": _tensor(chunks=_box(([], []))),
    "a tensor of a negative size": _tensor(size=(-24,)),
    "a tensor of a true size": _tensor(size=(True,)),
    "a tensor of a size of fractions": _tensor(size=(24.0,)),
    "a tensor of a size that is a list": _tensor(size=[24]),
    "a tensor of pieces that are a tuple": _tensor(chunks=tuple(_box(([0], [24])))),
    "a tensor of pieces that are text": _tensor(chunks="all"),
    "a tensor of half precision": _properties(TensorProperties(torch.float16)),
    "a tensor of double precision": _properties(TensorProperties(torch.float64)),
    "a tensor of a dtype that is text": _properties(TensorProperties("float32")),  # type: ignore[arg-type]
    "a tensor without properties": _properties(None),
    "a tensor whose properties are an index": _properties(MetadataIndex("a")),
    "a weight that is an object": lambda index: index.state_dict_metadata.update({WEIGHT: BytesStorageMetadata()}),
    "a weight that is a dict": lambda index: index.state_dict_metadata.update({WEIGHT: {}}),
    "a weight that is an index": lambda index: index.state_dict_metadata.update({WEIGHT: Metadata({})}),
    "an object that is a tensor": lambda index: index.state_dict_metadata.update(
        {entry(index, OBJECT)[0].fqn: index.state_dict_metadata[WEIGHT]}
    ),
    "an object of more than that": lambda index: index.state_dict_metadata.update(
        {entry(index, OBJECT)[0].fqn: Sets((_new, (BytesStorageMetadata,)), {"fqn": "a"})}
    ),
    "no weight": lambda index: (
        index.state_dict_metadata.pop(WEIGHT),
        index.storage_data.pop(entry(index, WEIGHT)[0]),
    ),
    "tensors that are a list": lambda index: setattr(index, "state_dict_metadata", [1]),
    "a tensor whose key is a number": lambda index: index.state_dict_metadata.update({1: BytesStorageMetadata()}),
    "plans of the planner": lambda index: setattr(index, "planner_data", {"a": ("a",)}),
    "more attributes": lambda index: vars(index).update(evil=1),
    "a state of slots": _raw_state((None, {"size": torch.Size([24])})),
    "a state that is text": _raw_state("state"),
    "a state of numbers": _raw_state({1: 2}),
    "no state": _raw_state(None),
}


# Records that are not what they are taken for


class _Attributes(collections.OrderedDict):  # type: ignore[type-arg]
    """Pickled as an ``OrderedDict`` that has attributes of its own, which stand before its methods."""

    own: dict[str, Any]

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), self.own, None, iter(self.items())


def _shadowed(name: str, value: Any) -> Callable[[Path, Path], None]:
    """Whoever asks the places for their items is told of none; the object that is loaded all the same calls."""

    def edit(folder: Path, canary: Path) -> None:
        replace(folder, OBJECT, saved([make_directory(canary)]))
        index = read_index(folder)
        places = _Attributes(index.storage_data)
        places.own = {name: value}
        index.storage_data = places
        write_index(folder, index)

    return edit


def _twice(which: str) -> Callable[[Path, Path], None]:
    """A key of a dict that is there twice: the first place is harmless, the second calls."""

    def edit(folder: Path, canary: Path) -> None:
        whole = read_index(folder)
        at, stored = entry(whole, OBJECT)
        replace(folder, OBJECT, saved([make_directory(canary)]))
        index = read_index(folder)
        other = at.fqn.replace(OBJECT, "rng_statf")
        index.storage_data = {MetadataIndex(other): stored, **index.storage_data}
        if which == "keys":
            index.state_dict_metadata = {other: BytesStorageMetadata(), **index.state_dict_metadata}
        content = pickle.dumps(index, 4)
        (folder / INDEX).write_bytes(content.replace(other.encode(), at.fqn.encode()))

    return edit


def _transformed(folder: Path, canary: Path) -> None:
    """Bytes that are a harmless archive as they are, and something else once they are decompressed."""
    replace(folder, OBJECT, saved_before_archives([None]) + SKIPPED + saved([make_directory(canary)]))
    index = read_index(folder)
    _, stored = entry(index, OBJECT)
    stored.transform_descriptors = ["stream.zstd/1"]
    write_index(folder, index)


def _default_factory(folder: Path, canary: Path) -> None:
    index = read_index(folder)
    index.storage_data = collections.defaultdict(dict, index.storage_data)
    write_index(folder, index)


def _larger_than_memory(folder: Path, canary: Path) -> None:
    with (folder / INDEX).open("r+b") as file:
        file.truncate(2**40)


def _shared_pieces(folder: Path, canary: Path) -> None:
    """One list of many pieces that many tensors have."""
    index = read_index(folder)
    pieces = _box(*(([number], [1]) for number in range(2_000)))
    stored = TensorStorageMetadata(TensorProperties(torch.uint8), torch.Size([2_000]), pieces)
    index.state_dict_metadata |= {f"shared-{number}": stored for number in range(2_000)}
    write_index(folder, index)


def index_lies() -> Iterator[Attack]:
    for name, change in {**PLACES, **TENSORS}.items():
        yield Attack(f"an index with {name}", _change(change))


def index_attacks() -> Iterator[Attack]:
    for name in ("items", "keys", "values", "get", "__iter__", "__class__"):
        yield Attack(f"an index whose places have {name} of their own", _shadowed(name, torch.Size), fires=True)
    yield Attack("an index of two places for one object", _twice("places"), fires=True)
    yield Attack("an index with an object twice", _twice("keys"), fires=True)
    yield Attack("an index with an object that is decompressed", _transformed, fires=True)
    yield Attack("an index with a dict of another class", _default_factory)
    yield Attack("an index larger than memory", _larger_than_memory, fits=False)
    yield Attack("an index of pieces that tensors share", _shared_pieces)
    for kind in ([], {}, (), 1, "Metadata", torch.Size([1]), MetadataIndex("a")):
        yield Attack(f"an index that is {kind!r}"[:60], lambda folder, canary, kind=kind: write_index(folder, kind))
    for protocol in (0, 1):
        yield Attack(
            f"an index of protocol {protocol}",
            lambda folder, canary, protocol=protocol: write_index(folder, read_index(folder), protocol),
        )
    yield Attack("an index cut short", lambda folder, canary: (folder / INDEX).write_bytes(b"\x80\x04\x95"))
    yield Attack(
        "an index with more behind its end",
        lambda folder, canary: (folder / INDEX).write_bytes((folder / INDEX).read_bytes() + b"\0"),
    )
