"""Archives that are something else than what ``torch.save`` writes, or hold something else than they are to hold."""

import argparse
import collections
import io
import json
import pickle
import struct
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile.checkpoints.family import DONE, Attack
from tests.hostile.checkpoints.payloads import Calls, Sets, make_directory, saved, saved_before_archives
from tests.hostile.checkpoints.places import (
    EXTRA_STATE,
    MOMENT,
    OBJECT,
    WEIGHT,
    change_common,
    common,
    rebuilt,
    replace,
    with_pickle,
    write_common,
)

Edit = Callable[[Path, Path], object]

# Forms


def _entry(archive: bytes, name: str) -> int:
    """Where the directory of an archive has a file of this name."""
    end = archive.rindex(b"PK\5\6")
    at = struct.unpack("<I", archive[end + 16 : end + 20])[0]
    while archive[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack("<3H", archive[at + 28 : at + 34])
        if archive[at + 46 : at + 46 + lengths[0]].decode().endswith(name):
            return at
        at += 46 + sum(lengths)
    raise LookupError(name)


def _patched(archive: bytes, name: str, at: int, content: bytes) -> bytes:
    at += _entry(archive, name)
    return archive[:at] + content + archive[at + len(content) :]


def _with_another(archive: bytes, name: str, content: bytes) -> bytes:
    made = io.BytesIO(archive)
    with zipfile.ZipFile(made, "a", zipfile.ZIP_STORED) as new:
        new.writestr(name, content)
    return made.getvalue()


def _with_directory(archive: bytes, times: int) -> bytes:
    """An archive that names its files so often."""
    end = archive.rindex(b"PK\5\6")
    at = struct.unpack("<I", archive[end + 16 : end + 20])[0]
    directory = archive[at:end] * times
    return archive[:at] + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, len(directory), at, 0)


def _tar(content: Any) -> bytes:
    """The format before the one before archives."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(content if name == "pickle" else 0, 2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def _bomb(content: Any) -> bytes:
    """64 MB of zeros for each storage, compressed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(content))) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**26) if "/data/" in name else old.read(name))
    return made.getvalue()


def _forms(whole: Any, evil: Any) -> dict[str, bytes]:
    """What stands where an archive of ``whole`` is to be, by name."""
    archive = saved(whole)
    first = archive.index(b"PK\3\4")
    return {
        "in the format before archives": saved_before_archives(whole),
        "in the format before archives, with a call": saved_before_archives(evil),
        "in a tar": _tar(evil),
        "in plain pickle": pickle.dumps(evil, 2),
        "compressed": rebuilt(archive, lambda name, data: data, zipfile.ZIP_DEFLATED),
        "compressed a thousandfold": _bomb(whole),
        "encrypted": _patched(archive, "data.pkl", 8, b"\1"),
        "with a pickle twice": _with_another(archive, "archive/data.pkl", pickle.dumps(evil, 2)),
        "with a pickle of another folder": _with_another(archive, "other/data.pkl", pickle.dumps(evil, 2)),
        "without a pickle": rebuilt(archive, lambda name, data: b"" if name.endswith("data.pkl") else data),
        "with code": _with_another(with_pickle(archive, pickle.dumps(evil, 2)), "archive/constants.pkl", b"\x80\x02)."),
        "in another byte order": rebuilt(archive, lambda name, data: b"big" if name.endswith("byteorder") else data),
        "that begins elsewhere": _patched(archive, "data.pkl", 42, struct.pack("<I", len(archive) - 3)),
        "that ends elsewhere": _patched(archive, "data.pkl", 24, struct.pack("<I", 2**31)),
        "with nothing at its beginning": archive[:first] + bytes(4) + archive[first + 4 :],
        "with bytes before it": b"evil" + archive,
        "with a directory of megabytes": _with_directory(archive, times=5_000),
        "cut short": archive[: len(archive) // 2],
        "of no bytes": b"",
    }


# Values


class _Tensor(torch.Tensor):
    """A class of tensors of its own."""


def _rebuilt(function: str, *arguments: Any) -> Any:
    return Calls(getattr(torch._utils, function), *arguments)


def _of_storage(offset: Any, size: Any, stride: Any, hooks: Any = None) -> Any:
    """A view of a storage of 24 numbers."""
    storage = torch.zeros(24)._typed_storage()
    hooks = collections.OrderedDict() if hooks is None else hooks
    return _rebuilt("_rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def _attributed() -> torch.Tensor:
    tensor = torch.zeros(24)
    tensor.copy_ = torch.Size([7])  # type: ignore[method-assign,assignment]
    return tensor


def _tensors() -> dict[str, Any]:
    """What is no plain tensor of 24 numbers in single precision."""
    zeros = torch.zeros(24)
    return {
        "of half precision": zeros.half(),
        "of numbers of another kind": zeros.int(),
        "of another shape": zeros.reshape(4, 6),
        "of fewer numbers": zeros[:23].clone(),
        "that is a parameter": torch.nn.Parameter(zeros),
        "of a class of its own": zeros.as_subclass(_Tensor),
        "with attributes": _attributed(),
        "that is sparse": zeros.to_sparse(),
        "that is nested": torch.nested.nested_tensor([zeros]),
        "that is quantized": torch.quantize_per_tensor(zeros, 1.0, 0, torch.qint8),
        "without storage": zeros.to("meta"),
        "of complex numbers, conjugate": torch.zeros(24, dtype=torch.complex64).conj(),
        "of one number, 24 times": _of_storage(0, (24,), (0,)),
        "of petabytes of one number": _of_storage(0, (2**50,), (0,)),
        "of more numbers than there are": _of_storage(0, (25,), (1,)),
        "of numbers behind the end": _of_storage(1, (24,), (1,)),
        "of numbers before the beginning": _of_storage(-1, (24,), (1,)),
        "of numbers backwards": _of_storage(23, (24,), (-1,)),
        "of numbers far from each other": _of_storage(0, (24,), (2**40,)),
        "of a true number of numbers": _of_storage(True, (24,), (1,)),
        "with hooks": _of_storage(0, (24,), (1,), {0: 1}),
        "that is a list": [zeros],
        "that is an array": np.zeros(24, np.float32),
        "that is none": None,
    }


def _objects() -> dict[str, Any]:
    """What no object of a checkpoint holds, though readers of weights may take it."""
    return {
        "a namespace": argparse.Namespace(items=1),
        "another namespace": types.SimpleNamespace(items=1),
        "a file in memory": io.BytesIO(b"evil"),
        "an array": np.zeros(3),
        "a number of NumPy": np.float32(1),
        "a path": Path("/etc/passwd"),
        "a set": {1, 2},
        "a counter": collections.Counter("evil"),
        "a dict with attributes": Sets((collections.OrderedDict, ()), {"items": torch.Size}),
        "a class": collections.OrderedDict,
        "a function": torch._utils._rebuild_tensor_v2,
        "a sparse tensor": torch.zeros(3).to_sparse(),
        "a device": torch.device("cpu"),
        "a key of tuples": {(1, 2): 3},
    }


# The common state


def _state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    state = json.loads(common(folder)["state"])
    change(state)
    return json.dumps(state)


def _common(name: str, value: Any, exported: str = DONE) -> tuple[str, Edit, str]:
    return f"a common state with {name}", lambda folder, canary: change_common(folder, **value), exported


def _train_state(name: str, change: Callable[[dict[str, Any]], Any], exported: str) -> tuple[str, Edit, str]:
    def edit(folder: Path, canary: Path) -> None:
        change_common(folder, state=_state(folder, change))

    return f"a state with {name}", edit, exported


def _deep(folder: Path, canary: Path) -> None:
    """Lists in each other that a pickle can hold, and no reader can walk."""
    content = pickle.PROTO + b"\2" + pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999 + pickle.STOP
    write_common(folder, with_pickle(saved({}), content))


def _extra_state_by_the_back_door(folder: Path, canary: Path) -> None:
    """Common state is laid over what is loaded from shards: here over what Transformer Engine loads by itself."""
    evil = torch.frombuffer(bytearray(pickle.dumps(make_directory(canary))), dtype=torch.uint8)
    change_common(folder, model={"decoder.layers.0.mlp.linear_fc1._extra_state": evil})


COMMONS: list[tuple[str, Edit, str]] = [
    _common("no state", {"state": ...}, "refused"),
    _common("a state that is a number", {"state": 1}, "refused"),
    _common("a state that is no JSON", {"state": "{"}, "refused"),
    _common("a state that is a list", {"state": "[]"}, "refused"),
    _common("a state without end", {"state": "[" * 100_000}, "refused"),
    _common("a state of a number without end", {"state": "1" * 100_000}, "refused"),
    _common("a state of more", {"state": '{"trainer": {}, "fingerprints": {}, "evil": 1}'}, "refused"),
    _common("no optimizer", {"optimizer": ...}),
    _common("an optimizer that is text", {"optimizer": "param_state_sharding_type"}),
    _common("an optimizer that is empty", {"optimizer": {"param_state_sharding_type": 1}}),
    _common("no schedule", {"scheduler": ...}),
    _common("a schedule that is a list", {"scheduler": [1]}),
    _common("random states", {"rng": {"torch": torch.zeros(3)}}),
    _common("more", {"evil": 1}),
    _train_state("fingerprints that are a list", lambda state: state.update(fingerprints=[]), "refused"),
    _train_state("fingerprints that are numbers", lambda state: state["fingerprints"].update(layout=1), "refused"),
    _train_state("a trainer that is text", lambda state: state.update(trainer="a"), "refused"),
    _train_state("no loops", lambda state: state["trainer"].pop("loops"), DONE),
    _train_state("loops that are a list", lambda state: state["trainer"].update(loops=[]), DONE),
]


# Extra states


def _extra(content: bytes) -> Edit:
    return lambda folder, canary: replace(
        folder, EXTRA_STATE, saved([torch.frombuffer(bytearray(content), dtype=torch.uint8)])
    )


def _extra_state(value: Any) -> Edit:
    return lambda folder, canary: replace(folder, EXTRA_STATE, saved([value]))


EXTRA_STATES: dict[str, Edit] = {
    "that is text": _extra_state("state"),
    "that is a dict": _extra_state({"recipe": None}),
    "of fractions": _extra_state(torch.zeros(3)),
    "of two dimensions": _extra_state(torch.zeros(3, 3, dtype=torch.uint8)),
    "that is a file in memory": _extra_state(io.BytesIO(pickle.dumps({}))),
    "that is no pickle": _extra(b"evil"),
    "that is a list": _extra(pickle.dumps([])),
    "of another thing": _extra(pickle.dumps({"evil": 1})),
    "with a scale that is text": _extra(pickle.dumps({"scale_fwd": "a"})),
    "with a scale of bytes": _extra(pickle.dumps({"scale_fwd": torch.zeros(3, dtype=torch.uint8)})),
    "with a recipe that is text": _extra(pickle.dumps({"recipe": "a"})),
    "with variables that are a list": _extra(pickle.dumps({"extra_fp8_variables": []})),
    "with variables of tensors": _extra(pickle.dumps({"extra_fp8_variables": {"a": torch.zeros(3)}})),
}


def archive_attacks() -> Iterator[Attack]:
    for name, value in _objects().items():
        yield Attack(
            f"a common state with {name}", lambda folder, canary, value=value: change_common(folder, scheduler=value)
        )
        yield Attack(
            f"an object with {name}", lambda folder, canary, value=value: replace(folder, OBJECT, saved([value]))
        )
    for name, value in _tensors().items():
        for place, key in (("weight", WEIGHT), ("moment", MOMENT)):
            yield Attack(
                f"a {place} {name}", lambda folder, canary, key=key, value=value: replace(folder, key, saved(value))
            )
    for name, edit, exported in COMMONS:
        yield Attack(name, edit, exported=exported)
    yield Attack("a common state of lists in each other", _deep)
    yield Attack("an extra state in the common state", _extra_state_by_the_back_door, exported=DONE)
    for name, edit in EXTRA_STATES.items():
        yield Attack(f"an extra state {name}", edit)
    for name in _forms([torch.zeros(1)], None):
        fires = "call" in name or "tar" in name or "plain" in name

        def in_common(folder: Path, canary: Path, name: str = name) -> None:
            write_common(folder, _forms({"a": torch.zeros(99)}, make_directory(canary))[name])

        def in_object(folder: Path, canary: Path, name: str = name) -> None:
            replace(folder, OBJECT, _forms([torch.zeros(99)], make_directory(canary))[name])

        def in_weight(folder: Path, canary: Path, name: str = name) -> None:
            replace(folder, WEIGHT, _forms(torch.zeros(24), make_directory(canary))[name])

        places = {"a common state": in_common, "an object": in_object, "a weight": in_weight}
        for place, edit in places.items():
            yield Attack(f"{place} {name}", edit, fires=fires and "tar" not in name)
