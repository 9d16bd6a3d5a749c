"""Megatron-Core weights to a Hugging Face folder that ``AutoModelForCausalLM`` loads."""

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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
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
from ctpd_nemo.text_files import naming

_logger = logging.getLogger(__name__)

GlobalTensor = Callable[[str, tuple[int, ...]], Tensor]
"""``(checkpoint name, shape) -> the whole tensor``; see :func:`hf_tensors`."""

# What travels with the weights: the tokenizer in its many forms, generation defaults, and the terms of the licence.
_COMPANIONS = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def export_hf(
    folder: str | Path,
    reference: str | Path,
    global_tensor: GlobalTensor,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face folder, all of it or nothing: it appears under its name once it is complete.

    One process runs it; it holds one shard of the export and one Megatron tensor in memory.

    Args:
        folder: To write; must not exist, or be empty.
        reference: The Hugging Face folder that the model was loaded from. Config, tokenizer, generation config and
            licence are copied from it.
        global_tensor: Where the weights come from, see :func:`hf_tensors`.
        dtype: Of all exported tensors; by default each has the dtype of its namesake in ``reference``.
        max_shard_bytes: A shard is closed before it would grow beyond this.
        finish: Called with the folder before it has its name, to add files of its own.

    Raises:
        InputError: ``folder`` is in use, or ``reference`` is no folder of a known family.
    """
    folder, reference = Path(folder), Path(reference)
    architecture = read_architecture(reference)
    stored = SafetensorsFolder(reference, architecture)
    with HFWriter(folder, max_shard_bytes) as writer:
        for name, tensor in hf_tensors(architecture, global_tensor):
            writer.add(name, tensor.to(dtype or stored.dtype(name)))
        copy_companions(reference, writer.partial, dtype)
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

    A context manager: leaving it without an exception names the shards, writes the index and renames the folder;
    an exception removes what was written.

    Attributes:
        partial: The folder being written.
        weight_map: Tensor -> number of its shard.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(str(folder), "something already there", "a folder that does not exist yet")
        if not folder.name:
            raise InputError(str(folder), "a folder that cannot be renamed to", "the name of a new folder")
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.weight_map: dict[str, int] = {}
        self._max_shard_bytes = max_shard_bytes
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
        if kind is None:
            self._finish()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; writes the shard at hand first where this one would make it too large."""
        if self._shard and self._shard_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._shard[name] = tensor.cpu().contiguous()
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
        self.partial.replace(self.folder)


def copy_companions(reference: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy what is not weights: ``config.json`` (its dtype replaced where one is given), tokenizer, licence."""
    if dtype is None:
        _copy(reference / "config.json", folder)
    else:
        config = json.loads((reference / "config.json").read_text(encoding="utf-8"))
        # transformers wrote torch_dtype until 4.55 and dtype since; both read both.
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in sorted({path for pattern in _COMPANIONS for path in reference.glob(pattern) if path.is_file()}):
        _copy(path, folder)


def _copy(path: Path, folder: Path) -> None:
    with naming(folder / path.name):
        shutil.copyfile(path, folder / path.name)
