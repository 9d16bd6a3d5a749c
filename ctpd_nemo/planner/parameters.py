"""Which parameters a rank holds, and how large Megatron's buffers of them are."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.convert.layout import blocks_shape, hf_tensor_shapes, layer_name, layer_parameters, shard_blocks
from ctpd_nemo.models.gpt import padded_vocab_size
from ctpd_nemo.parallel.layout import ParallelConfig

# The name of both the embedding and the output layer: a rank's rows of the vocabulary.
VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank.

    Attributes:
        name: As in Megatron-Core's checkpoints; layers count from 0 in every chunk.
        numel: Elements of this rank's share.
        replicated: Whether every rank of the tensor-parallel group holds all of it.
        shared: Whether it is the embedding that first and last pipeline stage both hold.
    """

    name: str
    numel: int
    replicated: bool = False
    shared: bool = False


def total_parameters(architecture: Architecture) -> int:
    """Elements of all weights of the model, as its folder holds them."""
    return sum(math.prod(shape) for shape in hf_tensor_shapes(architecture).values())


@functools.cache
def layer_share(architecture: Architecture, tensor: int) -> tuple[Parameter, ...]:
    """The parameters of one layer on one rank."""
    share = []
    for name in layer_parameters(architecture):
        blocks = shard_blocks(layer_name(0, name), architecture, 0, tensor)
        replicated = "norm" in name
        share.append(Parameter(name, math.prod(blocks_shape(blocks, architecture)), replicated))
    return tuple(share)


def chunk_layers(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Layers of one model chunk: of a pipeline stage, or of one of its virtual stages."""
    return architecture.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))


def stage_parameters(
    architecture: Architecture, parallel: ParallelConfig, stage: int, more: Sequence[Parameter] = ()
) -> list[list[Parameter]]:
    """The parameters of every chunk of a pipeline stage, on one rank, in Megatron-Core's order.

    ``more`` are those that the chunk with the output layer has beside the model's.
    """
    chunks = parallel.virtual_pipeline or 1
    layers = layer_share(architecture, parallel.tensor) * chunk_layers(architecture, parallel)
    vocabulary = padded_vocab_size(architecture.vocab_size, parallel.tensor) // parallel.tensor
    shared = architecture.tied_embeddings and parallel.pipeline > 1
    rows = Parameter(VOCABULARY, vocabulary * architecture.hidden_size, shared=shared)
    stages = []
    for chunk in range(chunks):
        parameters = list(layers)
        if stage == 0 and chunk == 0:
            parameters.insert(0, rows)
        if stage == parallel.pipeline - 1 and chunk == chunks - 1:
            parameters.append(Parameter("decoder.final_layernorm.weight", architecture.hidden_size, replicated=True))
            if not architecture.tied_embeddings or shared:
                parameters.append(rows)
            parameters += more
        stages.append(parameters)
    return stages


def buffer_numel(parameters: Sequence[Parameter], replicas: int, distributed_optimizer: bool) -> int:
    """Elements of the buffer that Megatron-Core lays parameters, or gradients, of one chunk out in.

    With the distributed optimizer parameters begin at multiples of 64 elements, and buckets end at multiples of 128 and
    of the ranks that share them; a shared embedding has a bucket to itself (``_ParamAndGradBuffer``).

    Args:
        parameters: Of the chunk, in Megatron-Core's order.
        replicas: Ranks that hold the same parameters.
        distributed_optimizer: Whether they share out the optimizer's work.
    """
    if not distributed_optimizer:
        return sum(parameter.numel for parameter in parameters)
    divisor = math.lcm(replicas, 128)
    end, open_bucket = 0, False
    for parameter in reversed(parameters):
        if parameter.shared and open_bucket:
            end = _up(end, divisor)
        end = _up(end, 64) + parameter.numel
        open_bucket = not parameter.shared
        if parameter.shared:
            end = _up(end, divisor)
    return _up(end, divisor)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
