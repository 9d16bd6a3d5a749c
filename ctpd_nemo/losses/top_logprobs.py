r"""The largest log-probs of each token beside that of its label, over a vocabulary-parallel output layer.

As in ``logprobs`` logits exist for one chunk of tokens at a time. With :math:`g_n` the gradient that arrives at the
label's log-prob and :math:`g_{n,j}` at the j-th largest one, of word :math:`v_j`,

.. math::
    \partial L/\partial z_{n,v} = [v = y_n] g_n + \sum_j [v = v_j] g_{n,j} - p_{n,v} (g_n + \sum_j g_{n,j}),

so that every rank needs its own share of the vocabulary only: each finds its own largest logits, and the largest of
those are the largest of all. The backward pass makes the logits again.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ctpd_nemo.losses.logprobs import LogitProduct, add_product, logit_buffer, over_shares, real_rows, token_chunks


class TopLogprobs(NamedTuple):
    """Log-probs of tokens.

    Attributes:
        label_N: Of the label, fp32 ``[N]``.
        top_NK: The K largest in descending order, fp32 ``[N, K]``.
        ids_NK: Which words they are of, int64 ``[N, K]``.
    """

    label_N: Tensor
    top_NK: Tensor
    ids_NK: Tensor


class _TopLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        k: int,
        rows: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = (0 if group is None else group.rank()) * len(weight_VH)
        max_N, sum_N, label_N = hidden_NH.new_empty((3, len(labels_N)), dtype=torch.float32).unbind()
        top_NK = hidden_NH.new_empty((len(labels_N), min(k, len(weight_VH))), dtype=torch.float32)
        ids_NK = torch.empty_like(top_NK, dtype=torch.int64)
        own_N, mine_N = _own(labels_N, first, len(weight_VH))
        logits, product = logit_buffer(len(labels_N), weight_VH), LogitProduct(weight_VH, rows)
        for part in token_chunks(len(labels_N), logits):
            chunk = product(hidden_NH[part], logits)
            torch.topk(chunk, top_NK.shape[1], out=(top_NK[part], ids_NK[part]))
            label_N[part] = chunk.gather(1, own_N[part, None]).squeeze(1)
            torch.amax(chunk, 1, out=max_N[part])
            torch.sum(chunk.sub_(max_N[part, None]).exp_(), 1, out=sum_N[part])
        label_N.masked_fill_(~mine_N, 0.0)
        ids_NK += first
        max_N, sum_N, label_N = over_shares(max_N, sum_N, label_N, group)
        if group is not None and group.size() > 1:
            top_NK, at_NK = gather_columns(top_NK, group).topk(k)
            ids_NK = gather_columns(ids_NK, group).gather(1, at_NK)
        lse_N = sum_N.log().add_(max_N)
        ctx.rows, ctx.first = rows, first
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N, lse_N, ids_NK)
        ctx.mark_non_differentiable(ids_NK)
        return label_N - lse_N, top_NK - lse_N[:, None], ids_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, grad_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_N, lse_N, ids_NK = ctx.saved_tensors
        # The label is one more word: columns of words and of their gradients.
        words_NJ = torch.cat([labels_N[:, None], ids_NK], dim=1)
        grad_NJ = torch.cat([grad_N[:, None], grad_NK], dim=1)
        sum_N1 = grad_NJ.sum(dim=1, keepdim=True)
        own_NJ, mine_NJ = _own(words_NJ, ctx.first, len(weight_VH))
        grad_NJ = grad_NJ * mine_NJ
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        logits, product = logit_buffer(len(labels_N), weight_VH), LogitProduct(weight_VH, ctx.rows)
        for part in token_chunks(len(labels_N), logits):
            chunk = product(hidden_NH[part], logits).sub_(lse_N[part, None]).exp_().mul_(-sum_N1[part])
            grads = chunk.scatter_add_(1, own_NJ[part], grad_NJ[part]).to(weight_VH.dtype)
            torch.mm(grads, weight_VH, out=grad_hidden_NH[part])
            add_product(grad_weight_VH, grads, hidden_NH[part].to(weight_VH.dtype))
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def _own(words: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Words counted from this rank's first, 0 where they are another's; and whether they are this rank's."""
    own = words - first
    mine = (own >= 0) & (own < size)
    return own.masked_fill(~mine, 0), mine


def gather_columns(share_NC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The columns of all ranks of a group side by side, in order of rank."""
    shares = [torch.empty_like(share_NC) for _ in range(group.size())]
    dist.all_gather(shares, share_NC.contiguous(), group=group)
    return torch.cat(shares, dim=1)


def top_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    k: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
) -> TopLogprobs:
    """Log-probs of labels and the ``k`` largest, differentiable in hidden states and weight.

    The gradient of ``hidden_NH`` is this rank's share only: the caller sums it over the group.

    Args:
        hidden_NH: Hidden states at the positions that predict a label, ``[N, H]``, equal on every rank of the group.
        weight_VH: This rank's rows of the output layer, ``[V, H]``; rank ``r`` holds rows ``r * V`` and up.
        labels_N: int64 ``[N]`` in ``[0, vocab_size)``.
        k: K, at most ``vocab_size``.
        vocab_size: Rows of the whole weight that are vocabulary; the rest is padding.
        group: The tensor-parallel group, ``None`` for one process.
    """
    if not 0 < k <= vocab_size:
        raise ValueError(f"the {k} largest of {vocab_size}")
    return TopLogprobs(
        *_TopLogprobs.apply(hidden_NH, weight_VH, labels_N, k, real_rows(weight_VH, vocab_size, group), group)
    )
