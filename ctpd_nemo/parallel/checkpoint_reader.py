"""A checkpoint that is open for reading: every byte of it that anyone uses comes through here.

Its index and its objects are read once, by rules, when it is opened, and what was read is what is used. Tensors are
read when they are asked for. Neither torch's nor Megatron-Core's own readers open a file of a checkpoint: they load
pickles by means that run what these name.
"""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_archives import Part, StoredTensor, read_archive, read_object
from ctpd_nemo.parallel.checkpoint_extra_state import ExtraState, is_extra_state, read_extra_state
from ctpd_nemo.parallel.checkpoint_files import find_damage, open_file, read_manifest
from ctpd_nemo.parallel.checkpoint_index import read_index
from ctpd_nemo.parallel.checkpoint_pickles import refusal

_INDEX, _COMMON, _FORMAT = ".metadata", "common.pt", "metadata.json"
# Where Megatron-Core, from 0.19 on, has what was in ``common.pt``.
_COMMON_OBJECT = "common_state/shard_0_1"


@dataclass
class TrainState:
    """What a checkpoint holds beside tensors.

    Attributes:
        trainer: JSON-like state of the training loop: counters, callbacks, the position in the data.
        fingerprints: What the run was trained on; compared on resume.
    """

    trainer: dict[str, Any]
    fingerprints: dict[str, str]


@contextlib.contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Turn whatever reading a damaged checkpoint raises into an ``InputError``."""
    try:
        yield
    except InputError:
        raise
    # Megatron-Core and torch have errors of their own, and assertions.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[-1].strip() or type(error).__name__
        found = f"a checkpoint that cannot be read ({reason})"
        raise InputError(str(folder), found, "a whole one; remove it to go on from the one before") from error


class CheckpointReader:
    """The tensors, objects and common state of a checkpoint.

    Attributes:
        folder: Its folder.
        metadata: What it holds, as torch's planners take it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the index, all objects and the common state.

        Raises:
            InputError: The folder is no whole checkpoint, or holds what no checkpoint does.
        """
        self.folder = Path(folder)
        damage = find_damage(self.folder, sums=False)
        if damage is not None:
            raise damage
        with reading(self.folder):
            self._sizes = {name: file["bytes"] for name, file in read_manifest(self.folder).items()}
            self._check_format()
            self._index = read_index(self._read_file(_INDEX), str(self.folder / _INDEX), self._sizes)
            self.metadata = self._index.metadata
            objects = [index for index in self._index.entries if index not in self._index.pieces]
            self._objects = {index.fqn: self._read_object(index.fqn, part) for index, part in self._parts(objects)}
            self._common = self._read_common()

    @classmethod
    def of(cls, checkpoint: "str | Path | CheckpointReader") -> "CheckpointReader":
        """The reader itself, or one of a folder."""
        return checkpoint if isinstance(checkpoint, CheckpointReader) else cls(checkpoint)

    # What is there

    def common(self) -> dict[str, Any]:
        """What is neither tensor nor of one rank, as it was saved; a copy."""
        return copy.deepcopy(self._common)

    def train_state(self) -> TrainState:
        """The part of it that is this project's.

        Raises:
            InputError: It is not as it was written.
        """
        with reading(self.folder):
            state = TrainState(**json.loads(self._common["state"]))
        fingerprints = state.fingerprints
        texts = isinstance(fingerprints, dict) and all(isinstance(text, str) for text in fingerprints.values())
        if not isinstance(state.trainer, dict) or not texts:
            raise InputError(str(self.folder), "a state of another kind", "that of a training run")
        return state

    def object(self, key: str) -> Any:
        """An object by its key; a copy."""
        value = self._objects[key]
        return [item.encode() if type(item) is ExtraState else copy.deepcopy(item) for item in value]

    def tensors(self, indices: Iterable[MetadataIndex]) -> Iterator[tuple[MetadataIndex, Tensor]]:
        """Pieces of tensors as they were written, on the CPU, in the order in which they are stored.

        Args:
            indices: The key of each tensor, and where the piece begins in it.

        Raises:
            InputError: What is there is no such tensor.
        """
        for index, part in self._parts(indices):
            yield index, self._stored(index, part).read()

    def check_tensors(self) -> None:
        """Read all that is stored of tensors but their elements.

        Raises:
            InputError: There is something else than the tensors that the index names.
        """
        with reading(self.folder):
            for index, part in self._parts(self._index.pieces):
                self._stored(index, part)

    # How it is read

    def _check_format(self) -> None:
        path = self.folder / _FORMAT
        content = json.loads(self._read_file(_FORMAT))
        backend = content.get("sharded_backend") if isinstance(content, dict) else None
        if backend != "torch_dist":
            raise InputError(f"{path}, sharded_backend", repr(backend), "torch_dist")

    def _read_common(self) -> dict[str, Any]:
        if _COMMON in self._sizes:
            path, size = self.folder / _COMMON, self._sizes[_COMMON]
            with open_file(path, size) as file:
                common = read_object(Part(file, 0, size, str(path)))
        else:
            (common,) = self._objects.get(_COMMON_OBJECT, [None])
        if type(common) is not dict:
            raise InputError(str(self.folder), "no common state", "that of a training run")
        return common

    def _read_file(self, name: str) -> bytes:
        path = self.folder / name
        if name not in self._sizes:
            raise InputError(str(path), "no such file in the manifest", "a checkpoint of Megatron-Core")
        with open_file(path, self._sizes[name]) as file:
            return bytes(Part(file, 0, self._sizes[name], str(path)).read(0, self._sizes[name]))

    def _read_object(self, key: str, part: Part) -> list[Any]:
        value = read_object(part)
        if type(value) is not list:
            raise refusal(part.place, f"a {type(value).__name__} for a list of objects")
        return [read_extra_state(item, part.place) for item in value] if is_extra_state(key) else value

    def _parts(self, indices: Iterable[MetadataIndex]) -> Iterator[tuple[MetadataIndex, Part]]:
        entries = self._index.entries
        in_order = sorted(indices, key=lambda index: (entries[index].file, entries[index].offset))
        for name, indices_of_file in itertools.groupby(in_order, key=lambda index: entries[index].file):
            path = self.folder / name
            with open_file(path, self._sizes[name]) as file:
                for index in indices_of_file:
                    entry = entries[index]
                    yield index, Part(file, entry.offset, entry.length, f"{path}, {index.fqn}")

    def _stored(self, index: MetadataIndex, part: Part) -> StoredTensor:
        tensor = read_archive(part)
        if type(tensor) is not StoredTensor:
            raise refusal(part.place, f"a {type(tensor).__name__} for a tensor")
        described = self.metadata.state_dict_metadata[index.fqn]
        shape, dtype = tuple(self._index.pieces[index]), described.properties.dtype  # type: ignore[union-attr]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            found = f"{tensor.dtype} of shape {tensor.shape}"
            raise InputError(part.place, found, f"{dtype} of shape {shape}, by the index")
        return tensor
