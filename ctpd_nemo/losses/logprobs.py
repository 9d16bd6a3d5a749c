r"""Token log-probs from hidden states, in chunks, over a vocabulary-parallel output layer.

For hidden states :math:`h_n`, output weight :math:`W` and labels :math:`y_n` the value is
:math:`\ell_n = z_{n,y_n} - \log\sum_v e^{z_{n,v}}` with :math:`z = hW^\top`; its gradient towards the logits is
:math:`\partial\ell_n/\partial z_{n,v} = [v = y_n] - e^{z_{n,v} - \log\sum e^z}`. Forward keeps one number a token
(the log of the sum); backward makes each chunk of logits again. Logits of at most one chunk exist at a time.

The vocabulary lies in equal shares over the tensor-parallel group. Each rank finds maximum, sum and label logit over
its share; three all-reduces of one number a token bring them together.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that may exist at once, in elements: 64 MiB in fp32.
CHUNK_LOGITS = 2**24


def _chunks(num_tokens: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocab)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        real_rows: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        rank = 0 if group is None else group.rank()
        own_N = labels_N - rank * len(weight_VH)
        mine_N = (own_N >= 0) & (own_N < len(weight_VH))
        own_N = own_N.masked_fill(~mine_N, 0)

        shape = labels_N.shape
        max_N, sum_N, label_N = (hidden_NH.new_empty(shape, dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(labels_N), len(weight_VH)):
            logits = _logits(hidden_NH[part], weight_VH, real_rows)
            label_N[part] = logits.gather(1, own_N[part, None]).squeeze(1)
            max_N[part] = logits.amax(1)
            sum_N[part] = logits.sub_(max_N[part, None]).exp_().sum(1)
        label_N.masked_fill_(~mine_N, 0.0)

        if group is not None and group.size() > 1:
            local_max_N = max_N.clone()
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group)
            sum_N *= (local_max_N - max_N).exp()
            dist.all_reduce(sum_N, group=group)
            dist.all_reduce(label_N, group=group)
        lse_N = sum_N.log().add_(max_N)
        ctx.save_for_backward(hidden_NH, weight_VH, own_N, mine_N, lse_N)
        ctx.real_rows = real_rows
        return label_N - lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, own_N, mine_N, lse_N = ctx.saved_tensors
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # fp32 whatever the weight: chunk after chunk would be rounded away in bf16.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        grad_label_N = grad_N.masked_fill(~mine_N, 0.0)
        for part in _chunks(len(own_N), len(weight_VH)):
            logits = _logits(hidden_NH[part], weight_VH, ctx.real_rows)
            grad_logits = logits.sub_(lse_N[part, None]).exp_().mul_(-grad_N[part, None])
            grad_logits.scatter_add_(1, own_N[part, None], grad_label_N[part, None])
            grad_logits = grad_logits.to(weight_VH.dtype)
            torch.mm(grad_logits, weight_VH, out=grad_hidden_NH[part])
            if grad_logits.dtype == torch.float32:
                grad_weight_VH.addmm_(grad_logits.t(), hidden_NH[part])
            else:
                grad_weight_VH += torch.mm(grad_logits.t(), hidden_NH[part])
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, real_rows: int) -> Tensor:
    """fp32 ``[C, V]``; rows of the weight that only pad the vocabulary get no probability."""
    logits = torch.mm(hidden_CH, weight_VH.t()).float()
    if real_rows < len(weight_VH):
        # Finite: on a rank whose rows are all padding, minus infinity less its maximum would be no number.
        logits[:, real_rows:] = torch.finfo(torch.float32).min
    return logits


def token_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Log-probs of labels under the softmax of ``hidden @ weight.T``, differentiable in both.

    The gradient of ``hidden_NH`` is this rank's share only: the caller sums it over the group.

    Args:
        hidden_NH: Hidden states at the positions that predict a label, ``[N, H]``, equal on every rank of the group.
        weight_VH: This rank's rows of the output layer, ``[V, H]``; rank ``r`` holds rows ``r * V`` and up.
        labels_N: int64 ``[N]`` in ``[0, vocab_size)``.
        vocab_size: Rows of the whole weight that are vocabulary; the rest is padding.
        group: The tensor-parallel group, ``None`` for one process.

    Returns:
        fp32 ``[N]``.
    """
    rank = 0 if group is None else group.rank()
    real_rows = min(max(vocab_size - rank * len(weight_VH), 0), len(weight_VH))
    return _TokenLogProbs.apply(hidden_NH, weight_VH, labels_N, real_rows, group)
