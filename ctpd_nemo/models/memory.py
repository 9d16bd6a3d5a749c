"""How much fits on a device: models side by side, and tokens in one forward pass."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import psutil
import torch
import torch.distributed as dist

from ctpd_nemo.convert.architecture import Architecture
from ctpd_nemo.data.batch import Microbatch, build_microbatch
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.data.loader import Batching
from ctpd_nemo.data.packing import pack, round_up
from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig, local_device

# Of free memory: what weights may take, and what activations may take of what the weights have left.
_WEIGHTS = 0.75
_ACTIVATIONS = 0.8
# Kernels index the elements of a tensor with 32 bits.
_MOST_ELEMENTS = 2**31 - 1


def free_bytes() -> int:
    """Memory that this process may still take: of its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        # What PyTorch keeps in its cache is free to it as well.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(local_device())[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def least_of_all_ranks(value: int) -> int:
    """The least of what the ranks of the job say; they call it together."""
    least = torch.tensor(value, dtype=torch.int64, device=local_device())
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def model_passes(weights: Sequence[int], free: int, together: bool | None) -> list[list[int]]:
    """Which models are held at the same time: in as few passes over the data as their weights allow.

    Args:
        weights: Bytes of each model on this rank.
        free: Bytes that are free.
        together: True for all in one pass, false for one each; ``None`` for as many as three quarters of the free
            memory hold.

    Returns:
        Models of each pass. One that does not fit has a pass of its own: what an estimate refuses may still run.
    """
    if together is not None:
        return [list(range(len(weights)))] if together else [[number] for number in range(len(weights))]
    budget = int(_WEIGHTS * free)
    return pack(np.minimum(weights, budget), budget)


def largest_microbatch(
    peak_of: Callable[[int], int], start: int, most: int, free: int, agree: Callable[[int], int] = least_of_all_ranks
) -> int:
    """The token budget of the largest forward pass that fits, doubled from ``start``.

    Where all sequences are equally long, activations grow with the tokens of a microbatch at most in proportion. So
    what twice as many take is known before they are tried, and one rank does not run out of memory while others of its
    model wait for it in a collective. What still does not fit makes all ranks go back.

    Args:
        peak_of: Runs a full microbatch of so many tokens; the most bytes it took, or 0 where they were too many.
        start: A budget that must fit.
        most: No budget above it is tried.
        free: Bytes that are free before the first try.
        agree: The least of what all ranks say.

    Raises:
        InputError: ``start`` does not fit.
    """
    tokens, peak = start, peak_of(start)
    if not agree(int(peak > 0)):
        raise InputError("method.microbatch_tokens", f"no memory for {start} beside the weights", "fewer tokens")
    while 2 * tokens <= most and agree(int(2 * peak <= _ACTIVATIONS * free)):
        peak = peak_of(2 * tokens)
        if not agree(int(peak > 0)):
            break
        tokens *= 2
    return tokens


def most_indexed_tokens(architecture: Architecture, parallel: ParallelConfig) -> int:
    """Tokens up to which the widest activation of a layer, gate and up projection, is indexed with 32 bits."""
    return _MOST_ELEMENTS * parallel.tensor // (2 * architecture.ffn_hidden_size)


def full_microbatch(tokens: int, max_length: int, batching: Batching) -> Microbatch:
    """The costliest microbatch of a budget: sequences of ``max_length``, and nearly every token one of a response."""
    length = min(max_length, tokens // 2)
    ids = np.zeros(length, dtype=np.int32)
    spans = np.arange(length - 1, dtype=np.int32)
    sequence = SideTokens(ids[:1], ids[1:], spans)
    response = EncodedResponse(sequence, sequence, np.arange(length), length - 1, truncated=False)
    padded = round_up(length, batching.sequence_multiple)
    return build_microbatch(
        [EncodedPair(index, str(index), response, response) for index in range(tokens // (2 * padded))],
        pad_token_id=0,
        pad_to_multiple=batching.pad_to_multiple,
        sequence_multiple=batching.sequence_multiple,
    )
