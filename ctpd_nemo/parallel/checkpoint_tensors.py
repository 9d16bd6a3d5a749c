"""Whole tensors out of a distributed checkpoint, in one process, whatever layout wrote it.

Megatron-Core stacks equal layers into one tensor with the layer in front. Here one layer is one tensor again, and only
its part of the files is read, so that a model of any size passes through the memory of one.
"""

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader, reading

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")
# Rows that a vocabulary is padded by: to a multiple of 128 for each tensor-parallel rank.
_MOST_PADDING = 2**20


class CheckpointTensors:
    """The tensors of a checkpoint by the names that ``convert`` uses, layers numbered over the whole model."""

    def __init__(self, checkpoint: str | Path | CheckpointReader) -> None:
        """Args:
        checkpoint: Its folder, which is opened, or what has it open.

        Raises:
            InputError: The folder is no whole checkpoint.
        """
        self._checkpoint = CheckpointReader.of(checkpoint)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor.

        Args:
            name: E.g. ``decoder.layers.7.mlp.linear_fc1.weight``.
            shape: Its unsharded shape; a padded vocabulary comes back with its padding.

        Raises:
            InputError: The checkpoint has no such tensor, or cannot be read.
        """
        folder = str(self._checkpoint.folder)
        layer = _LAYER.fullmatch(name)
        key = name if layer is None else layer[1] + layer[3]
        stored = self._checkpoint.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata) or (layer and not int(layer[2]) < (*stored.size, 0)[0]):
            raise InputError(folder, f"no tensor {name}", "a checkpoint of the reference's architecture")
        size = stored.size if layer is None else stored.size[1:]
        rows = shape[0] + _MOST_PADDING if layer is None else shape[0]
        if len(size) != len(shape) or size[1:] != shape[1:] or not shape[0] <= size[0] <= rows:
            raise InputError(
                f"{folder}, {name}", f"a tensor that has shape {tuple(size)}", f"{shape}, by the reference"
            )
        if layer is None:
            return self._read(key, stored, (0,) * len(size), size)
        return self._read(key, stored, (int(layer[2]), *[0] * len(size)), (1, *size)).squeeze(0)

    def region(
        self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], expected: tuple[int, ...] | None
    ) -> Tensor:
        """Read a part of a tensor, of which what is not stored is zero.

        Args:
            key: Its key in the checkpoint.
            offsets: Where the part begins.
            sizes: Its shape.
            expected: The shape of the whole tensor; ``None`` where it may have more or fewer rows.

        Raises:
            InputError: The checkpoint has no such tensor, or cannot be read.
        """
        stored = self._checkpoint.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise InputError(str(self._checkpoint.folder), f"no tensor {key}", "a checkpoint of this model")
        shape = tuple(stored.size)
        if shape != expected if expected is not None else shape[1:] != sizes[1:]:
            found, wanted = f"shape {shape}", f"shape {expected or ('any', *sizes[1:])}"
            raise InputError(f"{self._checkpoint.folder}, {key}", found, wanted)
        return self._read(key, stored, offsets, sizes)

    def _read(
        self, key: str, stored: TensorStorageMetadata, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Tensor:
        wanted = [ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))]
        items = {item.storage_index: item for item in create_read_items_for_chunk_list(key, stored, wanted)}
        tensor = torch.zeros(sizes, dtype=stored.properties.dtype)
        with reading(self._checkpoint.folder):
            for index, piece in self._checkpoint.tensors(items):
                item = items[index]
                target, source = (
                    tuple(slice(start, start + length) for start, length in zip(starts, item.lengths, strict=True))
                    for starts in (item.dest_offsets, item.storage_offsets)
                )
                tensor[target] = piece[source]
        return tensor
