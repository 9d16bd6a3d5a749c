"""Context parallelism: which tokens of packed sequences each rank of the group holds.

Every sequence is cut into ``2 C`` equal chunks, and rank ``r`` of ``C`` holds chunks ``r`` and ``2 C - 1 - r``, one
early and one late: under the causal mask all ranks then have equally much to do. This is the order that Transformer
Engine's attention and Megatron-Core's rotary embedding expect of packed (THD) sequences.
"""

import torch
from torch import Tensor


def held_tokens(cu_seqlens: Tensor, num_tokens: int, size: int, rank: int) -> Tensor:
    """Which tokens of a microbatch a rank holds, in the order in which it holds them.

    Args:
        cu_seqlens: int32 ``[S + 1]``, where sequences begin and end; every length is a multiple of ``2 * size``.
        num_tokens: T, of the whole microbatch.
        size: C, ranks of the context-parallel group.
        rank: This one's place among them.

    Returns:
        int64 ``[T / C]``, indices into the whole microbatch.
    """
    begin_S, length_S = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    held = num_tokens // size
    sequence = torch.repeat_interleave(
        torch.arange(len(length_S), device=cu_seqlens.device), length_S // size, output_size=held
    )
    chunk = length_S[sequence] // (2 * size)
    within = torch.arange(held, device=cu_seqlens.device) - begin_S[sequence] // size
    # The first half of what is held of a sequence is the early chunk, the second half the late one.
    late = within >= chunk
    number = torch.where(late, 2 * size - 1 - rank, rank)
    return begin_S[sequence] + number * chunk + within - late.long() * chunk


def order_of_all(cu_seqlens: Tensor, num_tokens: int, size: int) -> Tensor:
    """Where each token of the microbatch stands once the ranks' tokens are laid end to end; int64 ``[T]``."""
    gathered = torch.cat([held_tokens(cu_seqlens, num_tokens, size, rank) for rank in range(size)])
    return torch.empty_like(gathered).index_copy(0, gathered, torch.arange(num_tokens, device=gathered.device))
