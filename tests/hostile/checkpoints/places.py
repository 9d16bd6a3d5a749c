"""Where bytes of a stranger are in a checkpoint, and how they get there."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tests.hostile.checkpoints.payloads import saved

INDEX, COMMON = ".metadata", "common.pt"
# A weight that every export reads, of the newest and of the oldest layout of files.
WEIGHT, MOMENT = "decoder.final_layernorm.weight", "optimizer.state.exp_avg.decoder.final_layernorm.weight"
OBJECT, EXTRA_STATE = "rng_state", "decoder.layers.mlp.linear_fc1._extra_state"


def read_index(folder: Path) -> Metadata:
    return pickle.loads((folder / INDEX).read_bytes())


def write_index(folder: Path, index: Any, protocol: int = 4) -> None:
    (folder / INDEX).write_bytes(pickle.dumps(index, protocol))


def change_index(folder: Path, change: Callable[[Metadata], Any]) -> None:
    index = read_index(folder)
    change(index)
    write_index(folder, index)


def entry(index: Metadata, key: str) -> tuple[MetadataIndex, _StorageInfo]:
    """The first place of what has a key that begins so."""
    return next((at, stored) for at, stored in index.storage_data.items() if at.fqn.startswith(key))


def replace(folder: Path, key: str, content: bytes) -> None:
    """Other bytes for what is stored by a key: behind all others of its file, with an index that fits."""

    def change(index: Metadata) -> None:
        at, stored = entry(index, key)
        path = folder / stored.relative_path
        index.storage_data[at] = _StorageInfo(stored.relative_path, path.stat().st_size, len(content))
        with path.open("ab") as file:
            file.write(content)

    change_index(folder, change)


def common(folder: Path) -> dict[str, Any]:
    """What is in no shard: a file, or an object in releases of Megatron-Core from 0.19 on."""
    if (folder / COMMON).exists():
        return torch.load(folder / COMMON, weights_only=True)
    _, stored = entry(read_index(folder), "common_state")
    content = (folder / stored.relative_path).read_bytes()[stored.offset :][: stored.length]
    return torch.load(io.BytesIO(content), weights_only=True)[0]


def write_common(folder: Path, content: bytes) -> None:
    """As a file, which all releases read where there is one."""
    (folder / COMMON).write_bytes(content)


def change_common(folder: Path, **changed: Any) -> None:
    content = {**common(folder), **changed}
    write_common(folder, saved({name: value for name, value in content.items() if value is not ...}))


def with_pickle(archive: bytes, content: bytes) -> bytes:
    """An archive with another pickle in it."""
    return rebuilt(archive, lambda name, data: content if name.endswith("data.pkl") else data)


def rebuilt(archive: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with other files in it; an empty one is left out."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            if content := change(name, old.read(name)):
                new.writestr(name, content)
    return made.getvalue()


# What bytes of a pickle, and what an object, can stand in the place of


def _as_index(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)


def _as_common(folder: Path, content: bytes) -> None:
    write_common(folder, with_pickle(saved({}), content))


def _as_common_alone(folder: Path, content: bytes) -> None:
    write_common(folder, content)


def _as_object(folder: Path, content: bytes) -> None:
    replace(folder, OBJECT, with_pickle(saved([]), content))


def _as_weight(folder: Path, content: bytes) -> None:
    replace(folder, WEIGHT, with_pickle(saved(torch.zeros(24)), content))


def _as_moment(folder: Path, content: bytes) -> None:
    replace(folder, MOMENT, with_pickle(saved(torch.zeros(24)), content))


def _as_extra_state(folder: Path, content: bytes) -> None:
    replace(folder, EXTRA_STATE, saved([torch.tensor(list(content), dtype=torch.uint8)]))


PICKLES: dict[str, Callable[[Path, bytes], None]] = {
    "the index": _as_index,
    "the common state": _as_common,
    "the common state, no archive": _as_common_alone,
    "an object": _as_object,
    "a weight": _as_weight,
    "a moment": _as_moment,
    "an extra state": _as_extra_state,
}


def _in_index(folder: Path, value: Any, protocol: int) -> None:
    index = read_index(folder)
    index.planner_data = value
    write_index(folder, index, protocol)


def _in_plans(folder: Path, value: Any, protocol: int) -> None:
    """Where nothing that is read looks."""
    index = read_index(folder)
    index.all_local_plans = [value]
    write_index(folder, index, protocol)


def _as_place(folder: Path, value: Any, protocol: int) -> None:
    index = read_index(folder)
    at, _ = entry(index, WEIGHT)
    index.storage_data[at] = value
    write_index(folder, index, protocol)


def _in_common(folder: Path, value: Any, protocol: int) -> None:
    write_common(folder, saved({**common(folder), "scheduler": value}, protocol))


def _in_object(folder: Path, value: Any, protocol: int) -> None:
    replace(folder, OBJECT, saved([{"torch": value}], protocol))


def _for_weight(folder: Path, value: Any, protocol: int) -> None:
    replace(folder, WEIGHT, saved(value, protocol))


def _for_moment(folder: Path, value: Any, protocol: int) -> None:
    replace(folder, MOMENT, saved(value, protocol))


def _in_extra_state(folder: Path, value: Any, protocol: int) -> None:
    _as_extra_state(folder, pickle.dumps({"recipe": value}, protocol))


def _in_old_extra_state(folder: Path, value: Any, protocol: int) -> None:
    replace(folder, EXTRA_STATE, saved([io.BytesIO(saved({"recipe": value}, protocol))], 2))


VALUES: dict[str, Callable[[Path, Any, int], None]] = {
    "in the index": _in_index,
    "in plans of the index": _in_plans,
    "for a place": _as_place,
    "in the common state": _in_common,
    "in an object": _in_object,
    "for a weight": _for_weight,
    "for a moment": _for_moment,
    "in an extra state": _in_extra_state,
    "in an extra state of old": _in_old_extra_state,
}
