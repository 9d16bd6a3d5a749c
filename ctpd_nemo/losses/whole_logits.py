r"""Losses of the whole logits of a token, a chunk of tokens at a time.

Some losses need all logits of a token in one place: those that sort them, or compare two distributions word by word.
Here the logits of one chunk of tokens are made, gathered over the tensor-parallel group, handed to a function, and
forgotten. The loss is a sum over tokens, so its gradient towards the logits of a chunk is known as soon as they are:
forward takes it at once, with autograd within the chunk, and keeps only what it leaves at hidden states and weight.
Backward scales those, and no logits are made twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpd_nemo.losses import logprobs
from ctpd_nemo.losses.logprobs import LogitProduct, add_product, real_rows
from ctpd_nemo.losses.top_logprobs import gather_columns

# (logits of a chunk fp32 [C, V], which tokens) -> sums over them, fp32 [M]; the first is the loss.
LogitLoss = Callable[[Tensor, slice], Tensor]

# Buffers as large as the logits that exist at the same time: the other model's, both sorted with their places, and
# what autograd keeps between.
COPIES = 8


class WholeLogits:
    """The logits of a few tokens, whole on every rank of the tensor-parallel group."""

    def __init__(self, weight_VH: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None) -> None:
        """Args as those of ``logprobs.token_logprobs``."""
        self.weight_VH = weight_VH.detach()
        self.vocab_size = vocab_size
        self.group = group if group is not None and group.size() > 1 else None
        self._product = LogitProduct(self.weight_VH, real_rows(weight_VH, vocab_size, group))

    def __call__(self, hidden_CH: Tensor) -> Tensor:
        """fp32 ``[C, vocab_size]``, without a gradient."""
        out = hidden_CH.new_empty((len(hidden_CH), len(self.weight_VH)), dtype=torch.float32)
        share_CV = self._product(hidden_CH.detach(), out)
        if self.group is not None:
            share_CV = gather_columns(share_CV, self.group)
        return share_CV[:, : self.vocab_size]

    def share(self, grad_CV: Tensor) -> Tensor:
        """This rank's columns of a gradient towards the logits, zero at rows that pad the vocabulary."""
        size = len(self.weight_VH)
        first = 0 if self.group is None else self.group.rank() * size
        own_CV = grad_CV[:, first : first + size]
        return torch.nn.functional.pad(own_CV, (0, size - own_CV.shape[1]))

    def chunks(self, num_tokens: int) -> list[slice]:
        """As few equal chunks of tokens as the room for logits allows."""
        room = logprobs.CHUNK_LOGITS[self.weight_VH.device.type]
        size = max(1, room // (COPIES * self.vocab_size))
        size = -(-num_tokens // max(1, -(-num_tokens // size)))
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, max(1, size))]


class _LossOfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        evaluate: LogitLoss,
        num_sums: int,
        vocab_size: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        whole = WholeLogits(weight_VH, vocab_size, group)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        sums_M = hidden_NH.new_zeros(num_sums, dtype=torch.float32)
        grad_hidden_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        # fp32 whatever the weight: chunk after chunk would be rounded away in bf16.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        for part in whole.chunks(len(hidden_NH)):
            logits_CV = whole(hidden_NH[part])
            if not (needs_hidden or needs_weight):
                sums_M += evaluate(logits_CV, part)
                continue
            with torch.enable_grad():
                logits_CV = logits_CV.requires_grad_()
                chunk_M = evaluate(logits_CV, part)
                (grad_CV,) = torch.autograd.grad(chunk_M[0], logits_CV)
            sums_M += chunk_M.detach()
            own_CV = whole.share(grad_CV).to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                torch.mm(own_CV, whole.weight_VH, out=grad_hidden_NH[part])
            if grad_weight_VH is not None:
                add_product(grad_weight_VH, own_CV, hidden_NH[part].to(weight_VH.dtype))
        ctx.grads = grad_hidden_NH, grad_weight_VH
        ctx.dtype = weight_VH.dtype
        ctx.mark_non_differentiable(sums_M)
        return sums_M[0].clone(), sums_M

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_NH, grad_weight_VH = ctx.grads
        ctx.grads = None
        if grad_hidden_NH is not None:
            grad_hidden_NH *= grad.to(grad_hidden_NH.dtype)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.mul_(grad).to(ctx.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None, None, None


def loss_of_logits(
    evaluate: LogitLoss,
    num_sums: int,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of what a function makes of their whole logits; the first sum is differentiable.

    The gradient of ``hidden_NH`` is this rank's share only: the caller sums it over the group.

    Args:
        evaluate: The function; every rank of the group calls it with the same logits. What else it reads gets no
            gradient.
        num_sums: M, how many sums it gives.
        hidden_NH: Hidden states, ``[N, H]``, equal on every rank of the group.
        weight_VH: This rank's rows of the output layer, ``[V, H]``.
        vocab_size: Rows of the whole weight that are vocabulary.
        group: The tensor-parallel group, ``None`` for one process.

    Returns:
        The first sum, fp32 and differentiable; all sums, fp32 ``[M]``, detached.
    """
    return _LossOfLogits.apply(hidden_NH, weight_VH, evaluate, num_sums, vocab_size, group)
