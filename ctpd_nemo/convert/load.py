"""Hugging Face weights into Megatron-Core models: each rank reads the rows and columns it owns, and no others."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.convert.layout import (
    EMBEDDING,
    FINAL_NORM,
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT,
    Block,
    blocks_shape,
    canonical_name,
    is_vocabulary,
    layer_name,
    layer_parameters,
    shard_blocks,
)
from ctpd_nemo.convert.safetensors_folder import SafetensorsFolder
from ctpd_nemo.errors import InputError

_logger = logging.getLogger(__name__)


def load_hf_weights(
    model_chunks: Sequence[GPTModel], folder: str | Path, architecture: Architecture
) -> tuple[str, ...]:
    """Fill a model in place from a Hugging Face folder. Not a collective: each rank reads on its own.

    Call it before the optimizer is made, which copies the parameters where it keeps them in fp32.

    Args:
        model_chunks: This rank's part of the model, a chunk for each virtual pipeline stage, of any tensor, pipeline
            and virtual pipeline layout. Values are cast to the dtype of the parameters.
        folder: With ``model.safetensors``, or shards and their index.
        architecture: Of the folder, by :func:`~ctpd_nemo.convert.architecture.read_architecture`.

    Returns:
        The tensors of the folder that were left unread because they carry nothing (rotary buffers, a stored copy of
        a tied output layer).

    Raises:
        InputError: The folder does not hold exactly the tensors of this architecture, or the model has other
            parameters than the architecture.
    """
    reader = SafetensorsFolder(folder, architecture)
    for chunk in model_chunks:
        parameters = chunk_parameters(chunk)
        _check_parameters(parameters, chunk, architecture, str(folder))
        tp_rank, tp_size = get_pg_rank(chunk.pg_collection.tp), get_pg_size(chunk.pg_collection.tp)
        for name, parameter in parameters.items():
            if is_float8tensor(parameter):
                # Rows of a quantized tensor cannot be written alone: its scales are of the whole.
                whole = torch.empty(parameter.shape, dtype=chunk.config.params_dtype, device=parameter.device)
                fill_parameter(whole, name, architecture, reader, tp_rank, tp_size)
                with torch.no_grad():
                    parameter.copy_(whole)
            else:
                fill_parameter(parameter.data, name, architecture, reader, tp_rank, tp_size)
    if reader.ignored:
        _logger.info("%s: %d tensors not needed: %s", folder, len(reader.ignored), ", ".join(reader.ignored))
    return reader.ignored


def chunk_parameters(chunk: GPTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model chunk by their checkpoint names, layers numbered over the whole model."""
    layers = chunk.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    return {canonical_name(name, first_layer): parameter for name, parameter in chunk.named_parameters()}


@torch.no_grad()
def fill_parameter(
    destination: Tensor,
    name: str,
    architecture: Architecture,
    reader: SafetensorsFolder,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Fill a rank's share of one parameter in place.

    Args:
        destination: The share: of ``[out / tp, in]``, ``[out, in / tp]``, or whole where it is replicated. The rows
            of a vocabulary may be more than the folder has; those become zero.
        name: Checkpoint name of the parameter, see :mod:`ctpd_nemo.convert.layout`.
        architecture: Of the folder.
        reader: The folder.
        tp_rank: Rank in the tensor-parallel group.
        tp_size: Size of the tensor-parallel group.

    Raises:
        InputError: The share has another shape than the folder gives it.
    """
    padded = destination.shape[0] * tp_size if is_vocabulary(name) else None
    if padded is not None and padded < architecture.vocab_size:
        raise InputError(str(reader.folder), f"vocab_size = {architecture.vocab_size}", f"at most the model's {padded}")
    blocks = shard_blocks(name, architecture, tp_rank, tp_size, padded)
    shape = blocks_shape(blocks, architecture) if padded is None else (len(destination), architecture.hidden_size)
    if tuple(destination.shape) != shape:
        raise InputError(str(reader.folder), f"{name} of shape {shape}", f"the model's {tuple(destination.shape)}")
    at = 0
    for block in blocks:
        rows = reader.read(block)
        _check_tied_copy(block, rows, reader)
        destination[at : at + len(rows)].copy_(rows)
        at += len(rows)
    destination[at:].zero_()


def _check_parameters(
    parameters: dict[str, torch.nn.Parameter], chunk: GPTModel, architecture: Architecture, folder: str
) -> None:
    """The chunk has the parameters that the architecture gives these layers and ends, each once and no other."""
    if chunk.config.num_layers != architecture.num_layers:
        raise InputError(folder, f"{architecture.num_layers} layers", f"the model's {chunk.config.num_layers}")
    expected = {
        layer_name(layer.layer_number - 1, parameter)
        for layer in chunk.decoder.layers
        for parameter in layer_parameters(architecture)
    }
    if chunk.pre_process:
        expected.add(EMBEDDING)
    if chunk.post_process:
        expected.add(FINAL_NORM)
        # With one stage, a tied output layer uses the embedding's parameter; a last stage of several has a copy.
        if not (architecture.tied_embeddings and chunk.pre_process):
            expected.add(OUTPUT)
    for name in sorted(expected.symmetric_difference(parameters)):
        if name in parameters:
            raise InputError(folder, f"no weights for the model's {name}", "weights for every parameter")
        raise InputError(folder, f"weights for {name}, which the model lacks", "a model of the same architecture")


def _check_tied_copy(block: Block, rows: Tensor, reader: SafetensorsFolder) -> None:
    """A stored output layer that differs from the embedding it is said to be tied to would be lost in silence."""
    if block.tensor != HF_EMBEDDING or HF_OUTPUT not in reader.ignored:
        return
    if not torch.equal(reader.read(Block(HF_OUTPUT, block.rows)), rows):
        found = f"{HF_OUTPUT} that differs from {HF_EMBEDDING}, with tie_word_embeddings = true"
        raise InputError(str(reader.folder), found, "equal tensors, or tie_word_embeddings = false")
