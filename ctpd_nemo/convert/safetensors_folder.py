"""The weight files of a Hugging Face folder: one ``model.safetensors``, or shards with an index."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.convert.layout import HF_EMBEDDING, HF_OUTPUT, Block, hf_tensor_shapes
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# That of a model of 100,000 tensors has some ten million bytes.
_LARGEST_INDEX = 32 * 1024 * 1024
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order; ``model.safetensors`` goes before an index, as in ``transformers``.

    Raises:
        InputError: No weights, a malformed index, a shard that is missing or lies outside the folder.
    """
    single = folder / SINGLE_FILE
    if single.is_file():
        return [single]
    return sorted({folder / shard for shard in _read_index(folder).values()})


class SafetensorsFolder:
    """The tensors of a folder, checked by their headers and read block by block.

    All files are opened and every name, shape and dtype is compared with what the architecture asks for before any
    tensor is read, so every rank stops with the same error.

    Attributes:
        ignored: Tensors in the files that the model does not use and that are known to carry nothing: rotary
            frequency buffers, and an output layer stored beside the embedding it is tied to.

    Raises:
        InputError: Names the file and the tensor.
    """

    def __init__(self, folder: str | Path, architecture: Architecture) -> None:
        self.folder = Path(folder)
        files = weight_files(self.folder)
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in files:
            self._open(path)
        if files[0].name != SINGLE_FILE:
            for tensor, shard in _read_index(self.folder).items():
                if self._paths.get(tensor) != self.folder / shard:
                    raise InputError(str(self.folder / shard), f"no tensor {tensor}", f"the tensors {INDEX_FILE} names")
        expected = hf_tensor_shapes(architecture)
        self.ignored = self._check_names(expected, architecture)
        for tensor, shape in expected.items():
            self._check_tensor(tensor, shape)
        if HF_OUTPUT in self.ignored:
            self._check_tensor(HF_OUTPUT, expected[HF_EMBEDDING])

    def dtype(self, tensor: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return _DTYPES[self._handles[tensor].get_slice(tensor).get_dtype()]

    def read(self, block: Block) -> Tensor:
        """Read a block, and no more than the block, in the dtype in which it is stored."""
        rows = self._handles[block.tensor].get_slice(block.tensor)
        start, stop = block.rows
        if block.columns is None:
            return rows[start:stop]
        return rows[start:stop, block.columns[0] : block.columns[1]]

    def _open(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(str(path), f"a file that cannot be read ({error})", "a safetensors file") from error
        for tensor in handle.keys():  # noqa: SIM118 - not a dict
            if tensor in self._paths:
                raise InputError(str(path), f"{tensor}, also in {self._paths[tensor].name}", "each tensor once")
            self._paths[tensor], self._handles[tensor] = path, handle

    def _check_names(self, expected: dict[str, tuple[int, ...]], architecture: Architecture) -> tuple[str, ...]:
        for tensor in expected:
            if tensor not in self._paths:
                raise InputError(
                    str(self.folder), f"no tensor {tensor}", f"all tensors of a {architecture.family} model"
                )
        spare = [tensor for tensor in self._paths if tensor not in expected]
        for tensor in spare:
            if not (tensor.endswith(".rotary_emb.inv_freq") or tensor == HF_OUTPUT):
                raise InputError(str(self._paths[tensor]), f"tensor {tensor}", "only tensors that the model uses")
        return tuple(spare)

    def _check_tensor(self, tensor: str, shape: tuple[int, ...]) -> None:
        stored = self._handles[tensor].get_slice(tensor)
        place = str(self._paths[tensor])
        if tuple(stored.get_shape()) != shape:
            raise InputError(place, f"{tensor} of shape {tuple(stored.get_shape())}", f"{shape}, by config.json")
        if stored.get_dtype() not in _DTYPES:
            raise InputError(place, f"{tensor} of dtype {stored.get_dtype()}", f"one of {', '.join(_DTYPES)}")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> name of its shard."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise InputError(str(folder), f"neither {SINGLE_FILE} nor {INDEX_FILE}", "weights in the safetensors format")
    shards = read_object(path, "a safetensors index", _LARGEST_INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(str(path), f"weight_map = {shards!r}", "a safetensors index")
    if not shards:
        raise InputError(str(path), "an empty weight_map", "a safetensors index")
    for tensor, shard in shards.items():
        # A link may point elsewhere, as in the Hugging Face cache; the name itself may not.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(str(path), f"{tensor} in {shard!r}", "the name of a file in the same folder")
        if not (folder / shard).is_file():
            raise InputError(str(folder / shard), f"no such file, where {tensor} should be", "every shard of the index")
    return shards
