"""What losses over whole distributions read of a model: states at the positions that predict a response token.

Such a loss needs all tokens of a response in one place. Where context-parallel ranks hold parts of each sequence, their
hidden states are brought together, and every rank computes the same loss: each then takes an equal share of it, and
the gradients of all shares are summed, those of hidden states on their way back to the rank that holds them, those of
weights over the data- and context-parallel ranks.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.forward import output_weight
from ctpd_nemo.parallel.context import order_of_all


@dataclass(frozen=True)
class ResponseStates:
    """What a loss over whole distributions is made of, at the N positions that predict a response token.

    Attributes:
        hidden_NH: Hidden states; their gradient is this rank's share, summed over the tensor-parallel group later.
        weight_VH: This rank's rows of the output layer.
        vocab_size: Rows of the whole output layer that are vocabulary.
        inputs_N: The token at the position, int64.
        labels_N: The token that it predicts, int64.
        lengths_R: Response tokens of each sequence, int64 ``[R]``.
    """

    hidden_NH: Tensor
    weight_VH: Tensor
    vocab_size: int
    inputs_N: Tensor
    labels_N: Tensor
    lengths_R: Tensor


def response_states(model: GPTModel, hidden_1TH: Tensor, microbatch: Microbatch, vocab_size: int) -> ResponseStates:
    """The states at response positions, alike on every tensor- and context-parallel rank.

    Args:
        model: The chunk with the output layer.
        hidden_1TH: What the chunk returned: hidden states of the tokens that this rank holds.
        microbatch: All of it.
        vocab_size: Rows of the output layer that are vocabulary.
    """
    position_N, group = response_positions(microbatch), parallel_state.get_context_parallel_group()
    hidden_TH, held_N = hidden_1TH[0], position_N
    if group.size() > 1:
        # Named for another region, it does what is needed here: gather forward, reduce-scatter backward.
        hidden_TH = gather_from_sequence_parallel_region(hidden_TH, True, group)
        held_N = order_of_all(microbatch.cu_seqlens, microbatch.num_tokens, group.size())[position_N]
    return ResponseStates(
        hidden_TH.index_select(0, held_N),
        output_weight(model),
        vocab_size,
        microbatch.tokens[position_N],
        microbatch.labels[position_N],
        response_lengths(microbatch),
    )


def response_positions(microbatch: Microbatch) -> Tensor:
    """The positions that predict a response token, ascending, int64 ``[N]``."""
    return (microbatch.labels >= 0).nonzero().squeeze(1)


def response_lengths(microbatch: Microbatch) -> Tensor:
    """How many of them each sequence has, int64 ``[S]``."""
    before_T = torch.cat([microbatch.labels.new_zeros(1), (microbatch.labels >= 0).cumsum(0)])
    return before_T[microbatch.cu_seqlens.long()].diff()
