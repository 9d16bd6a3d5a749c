"""Whole tensors out of a distributed checkpoint, in one process, whatever layout wrote it.

Megatron-Core stacks equal layers into one tensor with the layer in front. Here one layer is one tensor again, and only
its part of the files is read, so that a model of any size passes through the memory of one.
"""

import io
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint import check_is_checkpoint, reading

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")


class CheckpointTensors:
    """The tensors of a checkpoint by the names that ``convert`` uses, layers numbered over the whole model."""

    def __init__(self, folder: str | Path) -> None:
        """Open a checkpoint; reads its index only.

        Raises:
            InputError: The folder is no whole checkpoint.
        """
        check_is_checkpoint(folder)
        self._folder = folder
        self._reader = FileSystemReader(str(folder))
        with reading(folder):
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor.

        Args:
            name: E.g. ``decoder.layers.7.mlp.linear_fc1.weight``.
            shape: Its unsharded shape; a padded vocabulary comes back with its padding.

        Raises:
            InputError: The checkpoint has no such tensor, or cannot be read.
        """
        layer = _LAYER.fullmatch(name)
        key = name if layer is None else layer[1] + layer[3]
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata) or (layer and int(layer[2]) >= stored.size[0]):
            raise InputError(str(self._folder), f"no tensor {name}", "a checkpoint of the reference's architecture")
        if layer is None:
            return self._read(key, stored, torch.Size([0] * len(stored.size)), stored.size)
        number = int(layer[2])
        return self._read(
            key, stored, torch.Size([number, *[0] * len(shape)]), torch.Size([1, *stored.size[1:]])
        ).squeeze(0)

    def _read(self, key: str, stored: TensorStorageMetadata, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(offsets=offsets, sizes=sizes)])
        region = _Region(torch.empty(sizes, dtype=stored.properties.dtype))
        with reading(self._folder):
            self._reader.read_data(LoadPlan(items), region).wait()
        return region.tensor


class _Region(LoadPlanner):
    """Where the pieces of one tensor go; the plan is made, so only its last part is left to do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = self.tensor
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, offset, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the tensor was read in place."""

    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise TypeError(f"{read_item.storage_index.fqn} is no tensor")
