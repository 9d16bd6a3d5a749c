"""What the pickles of a checkpoint ask for, looked at before anything loads them.

Megatron-Core's ``torch_dist`` format keeps three kinds of pickles: ``.metadata``, which torch (2.13) reads by plain
``pickle``; ``common.pt``; and objects that are no tensors, among the tensors in the ``.distcp`` files, which torch's
planner reads with ``weights_only=False``. A pickle can call whatever it names. So each is read here first by a reader
that knows only what checkpoints are made of; what passes that one is harmless to the others.

Beyond this lies what Transformer Engine keeps of its FP8 scales: bytes to this format, which that library reads itself.
"""

import dataclasses
import enum
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

_INDEX, _COMMON, _FORMAT = ".metadata", "common.pt", "metadata.json"
# Modules of torch whose records and names of kinds an index is made of.
_RECORDS = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))
_OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
_KNOWN = "a checkpoint of Megatron-Core's torch_dist format, which asks for nothing but its own records"


def check_pickles(folder: str | Path) -> None:
    """Read every pickle of a checkpoint by rules.

    Raises:
        InputError: One asks for anything but the records of a checkpoint, or the index names a file that is not the
            checkpoint's own.
        Exception: Whatever reading a damaged file raises.
    """
    folder = Path(folder)
    backend = read_object(folder / _FORMAT).get("sharded_backend")
    if backend != "torch_dist":
        raise InputError(f"{folder / _FORMAT}, sharded_backend", repr(backend), "torch_dist")
    if (folder / _COMMON).exists():
        _check_object(folder / _COMMON, (folder / _COMMON).read_bytes())
    with (folder / _INDEX).open("rb") as file:
        index = _IndexReader(file, str(folder / _INDEX)).load()
    for key, stored in index.storage_data.items():
        name = stored.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
            raise InputError(str(folder / _INDEX), f"{key.fqn} in {name!r}", "names of files in the same folder")
        if isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            _check_object(folder / name, _part(folder / name, stored.offset, stored.length))


class _IndexReader(pickle.Unpickler):
    """Builds the records of an index, and nothing else."""

    def __init__(self, file: Any, place: str) -> None:
        super().__init__(file)
        self._place = place

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for by name; it may call it."""
        if (module, name) in _OTHERS:
            return super().find_class(module, name)
        # A name with dots would lead through a module to what it has imported.
        found = getattr(importlib.import_module(module), name, None) if module in ("torch", *_RECORDS) else None
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        is_record = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
        if is_record and found.__module__ == module:
            return found
        raise InputError(self._place, f"a pickle that asks for {module}.{name}", _KNOWN)


def _part(path: Path, offset: int, length: int) -> bytes:
    size = path.stat().st_size
    if not 0 <= offset <= offset + length <= size:
        raise InputError(str(path), f"{size:,} bytes", f"an object at byte {offset:,}, of {length:,} bytes")
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _check_object(path: Path, content: bytes) -> None:
    """An object that torch's own reader of weights can read: tensors, numbers, text and what holds them."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The first words are the same for all, and advice.
        words = [line.strip() for line in str(error).splitlines() if "nsupported" in line]
        raise InputError(str(path), f"a pickle that is not of weights ({' '.join(words[:1])})", _KNOWN) from error
