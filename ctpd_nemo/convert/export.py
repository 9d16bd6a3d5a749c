"""Megatron-Core weights to a Hugging Face folder that ``AutoModelForCausalLM`` loads."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_pg_size
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.companions import ReaderFiles, copy_companions
from ctpd_nemo.convert.layout import (
    blocks_shape,
    hf_tensor_shapes,
    is_vocabulary,
    megatron_parameters,
    shard_blocks,
)
from ctpd_nemo.convert.load import chunk_parameters
from ctpd_nemo.convert.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from ctpd_nemo.errors import InputError

_logger = logging.getLogger(__name__)

GlobalTensor = Callable[[str, tuple[int, ...]], Tensor]
"""``(checkpoint name, shape) -> the whole tensor``; see :func:`hf_tensors`."""


def export_hf(
    folder: str | Path,
    reference: str | Path,
    global_tensor: GlobalTensor,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    finish: Callable[[Path], None] | None = None,
    reader: ReaderFiles | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face folder, all of it or nothing: it appears under its name once it is complete.

    One process runs it; it holds one shard of the export and one Megatron tensor in memory.

    Args:
        folder: To write; must not exist, or be empty.
        reference: The Hugging Face folder that the model was loaded from. Config, generation config and licence are
            copied from it, and the tokenizer where no other is given.
        global_tensor: Where the weights come from, see :func:`hf_tensors`.
        dtype: Of all exported tensors; by default each has the dtype of its namesake in ``reference``, or that of
            ``global_tensor`` where it would be rounded to the former: steps of training are smaller than that.
        max_shard_bytes: A shard is closed before it would grow beyond this.
        finish: Called with the folder before it has its name, to add files of its own.
        reader: Tokenizer, chat template and stop tokens that are not those of ``reference``.
        check: Called with the folder when all is in it, before it has its name; what it raises leaves no folder.

    Raises:
        InputError: ``folder`` is in use, or ``reference`` is no folder of a known family; what was written is not what
            is there.
    """
    folder, reference = Path(folder), Path(reference)
    architecture = read_architecture(reference)
    stored = SafetensorsFolder(reference, architecture)
    with HFWriter(folder, max_shard_bytes, check) as writer:
        widened: torch.dtype | None = None
        for name, tensor in hf_tensors(architecture, global_tensor):
            own = dtype or torch.promote_types(tensor.dtype, stored.dtype(name))
            if own != stored.dtype(name):
                widened = own
            writer.add(name, tensor.to(own))
        copy_companions(reference, writer.partial, dtype or widened, reader)
        if finish is not None:
            finish(writer.partial)
    _logger.info("%s: %d tensors exported", folder, len(writer.weight_map))


def hf_tensors(architecture: Architecture, global_tensor: GlobalTensor) -> Iterator[tuple[str, Tensor]]:
    """All Hugging Face tensors of a model, one Megatron tensor at a time.

    Args:
        architecture: Of the model.
        global_tensor: Called with the checkpoint name (``decoder.layers.7.mlp.linear_fc1.weight``, layers numbered
            over the whole model, norms under their fused names) and the unsharded shape; ``linear_fc1`` is all gate
            rows, then all up rows. A vocabulary tensor may come back with padding rows, which are cut.

    Raises:
        InputError: A tensor of another shape.
    """
    for parameter in megatron_parameters(architecture):
        shape = blocks_shape(shard_blocks(parameter, architecture), architecture)
        tensor = global_tensor(parameter, shape)
        rows = tensor[: shape[0]] if is_vocabulary(parameter) else tensor
        if tuple(rows.shape) != shape:
            raise InputError(parameter, f"a tensor that has shape {tuple(tensor.shape)}", f"{shape}, by config.json")
        yield from split_parameter(parameter, rows, architecture).items()


def split_parameter(parameter: str, tensor: Tensor, architecture: Architecture) -> dict[str, Tensor]:
    """Cut one unsharded Megatron tensor into its Hugging Face tensors: query, key and value; gate and up; or itself."""
    blocks = shard_blocks(parameter, architecture)
    shapes = hf_tensor_shapes(architecture)
    parts = {block.tensor: tensor.new_empty(shapes[block.tensor]) for block in blocks}
    at = 0
    for block in blocks:
        start, stop = block.rows
        parts[block.tensor][start:stop] = tensor[at : at + stop - start]
        at += stop - start
    return parts


def model_tensors(model_chunks: Sequence[GPTModel]) -> GlobalTensor:
    """The weights of a model that is whole in this process, as a source for an export.

    Raises:
        ValueError: The model is shared by tensor-parallel ranks.
    """
    parameters: dict[str, Tensor] = {}
    for chunk in model_chunks:
        if get_pg_size(chunk.pg_collection.tp) > 1:
            raise ValueError("the model is split over tensor-parallel ranks: export it from a checkpoint")
        parameters |= {name: parameter.detach() for name, parameter in chunk_parameters(chunk).items()}
    return lambda name, shape: parameters[name]


class HFWriter:
    """Sharded safetensors files with their index, in a folder that appears when it is complete.

    A context manager: leaving it without an exception names the shards, writes the index, reads every tensor back,
    and renames the folder; an exception removes what was written.

    Attributes:
        partial: The folder being written.
        weight_map: Tensor -> number of its shard.
    """

    def __init__(self, folder: Path, max_shard_bytes: int, check: Callable[[Path], None] | None = None) -> None:
        """Args:
        folder: To write; must not exist, or be empty.
        max_shard_bytes: A shard is closed before it would grow beyond this.
        check: Called with ``partial`` before it is renamed.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(str(folder), "something already there", "a folder that does not exist yet")
        if not folder.name:
            raise InputError(str(folder), "a folder that cannot be renamed to", "the name of a new folder")
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.weight_map: dict[str, int] = {}
        self._max_shard_bytes = max_shard_bytes
        self._check = check
        self._sums: dict[str, str] = {}
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shards = 0
        self._total_bytes = 0

    def __enter__(self) -> "HFWriter":
        # What a killed export left behind is of no use to anybody.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            if not finished:
                shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; writes the shard at hand first where this one would make it too large."""
        if self._shard and self._shard_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.cpu().contiguous()
        self._sums[name] = tensor_sum(self._shard[name])
        self._shard_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self.weight_map[name] = self._shards

    def _flush(self) -> None:
        path = self._unnamed(self._shards)
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # What the system said is in its text alone.
            if (said := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from error
        self._shards += 1
        self._shard, self._shard_bytes = {}, 0

    def _unnamed(self, shard: int) -> Path:
        """A shard whose final name waits for the number of shards."""
        return self.partial / f"shard-{shard}"

    def _finish(self) -> None:
        self._flush()
        if self._shards == 1:
            self._unnamed(0).rename(self.partial / SINGLE_FILE)
        else:
            names = [f"model-{n + 1:05d}-of-{self._shards:05d}.safetensors" for n in range(self._shards)]
            for shard, name in enumerate(names):
                self._unnamed(shard).rename(self.partial / name)
            weight_map = {tensor: names[shard] for tensor, shard in self.weight_map.items()}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._read_back()
        if self._check is not None:
            self._check(self.partial)
        self.partial.replace(self.folder)

    def _read_back(self) -> None:
        """Compare every tensor on disk with what was to be written, bit for bit."""
        left = dict(self._sums)
        for path in sorted(self.partial.glob("*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    if left.pop(name, None) != tensor_sum(shard.get_tensor(name)):
                        raise InputError(str(path), f"{name} with other bits", "the tensor that was written")
        if left:
            raise InputError(str(self.partial), f"no {', '.join(sorted(left)[:3])}", "every tensor that was written")


def tensor_sum(tensor: Tensor) -> str:
    """A checksum of a tensor's bits, dtype and shape."""
    told = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    if tensor.numel():
        told.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()
