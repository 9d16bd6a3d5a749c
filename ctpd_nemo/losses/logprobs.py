r"""Token log-probs from hidden states, in chunks, over a vocabulary-parallel output layer.

For hidden states :math:`h_n`, output weight :math:`W` and labels :math:`y_n` the value is
:math:`\ell_n = z_{n,y_n} - \log\sum_v e^{z_{n,v}}` with :math:`z = hW^\top`. With
:math:`p_{n,v} = e^{z_{n,v} - \log\sum e^z}` and the gradient :math:`g_n` that arrives, span weights folded in,

.. math::
    \partial L/\partial h_n = g_n \sum_v ([v = y_n] - p_{n,v}) W_v, \qquad
    \partial L/\partial W_v = \sum_n ([v = y_n] - p_{n,v})\, g_n h_n,

so that :math:`g` scales rows of width H and never the logits. Logits of one chunk of tokens exist at a time, in one
buffer, in fp32. Forward leaves the last chunk's exponentials in it, where backward begins; it makes the logits of the
chunks before it again. Where all tokens fit one chunk, nothing is computed twice.

The vocabulary lies in equal shares over the tensor-parallel group. Each rank finds maximum, sum and label logit over
its share; two all-reduces bring them together.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that may exist at once, in elements, by type of device: 256 MiB on the CPU, 1 GiB on a GPU. More are faster:
# fewer are made again, and fewer chunks read and write the gradient of the weight.
CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**28}


def token_chunks(num_tokens: int, logits: Tensor) -> list[slice]:
    """As few equal chunks as the buffer allows."""
    if num_tokens == 0:
        return []
    size = -(-num_tokens // -(-num_tokens // len(logits)))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def logit_buffer(num_tokens: int, weight_VH: Tensor) -> Tensor:
    """Room for the logits of one chunk, fp32 ``[C, V]``."""
    most = max(1, CHUNK_LOGITS[weight_VH.device.type] // len(weight_VH))
    return weight_VH.new_empty((min(most, num_tokens), len(weight_VH)), dtype=torch.float32)


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

        max_N, sum_N, label_N = hidden_NH.new_empty((3, len(labels_N)), dtype=torch.float32).unbind()
        logits = logit_buffer(len(labels_N), weight_VH)
        product = LogitProduct(weight_VH, real_rows)
        for part in token_chunks(len(labels_N), logits):
            exps = product(hidden_NH[part], logits)
            label_N[part] = exps.gather(1, own_N[part, None]).squeeze(1)
            torch.amax(exps, 1, out=max_N[part])
            torch.sum(exps.sub_(max_N[part, None]).exp_(), 1, out=sum_N[part])
        label_N.masked_fill_(~mine_N, 0.0)

        local_max_N = max_N
        max_N, sum_N, label_N = over_shares(max_N, sum_N, label_N, group)
        lse_N = sum_N.log().add_(max_N)
        if any(ctx.needs_input_grad):
            # The buffer is nobody's input or output: saved as it is, it holds the last chunk's exponentials.
            ctx.logits, ctx.real_rows = logits, real_rows
            ctx.save_for_backward(hidden_NH, weight_VH, own_N, mine_N, lse_N, local_max_N)
        return label_N - lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, own_N, mine_N, lse_N, local_max_N = ctx.saved_tensors
        logits = ctx.logits
        if logits is None:
            raise RuntimeError("token_logprobs keeps its logits for one backward pass")
        ctx.logits = None
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # fp32 whatever the weight: chunk after chunk would be rounded away in bf16.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        # Both gradients are of probabilities less one at the label, so everything carries a minus.
        scale_N1 = grad_N.neg()[:, None]
        one_N1 = mine_N.float().neg()[:, None]
        product = LogitProduct(weight_VH, ctx.real_rows)
        parts = token_chunks(len(own_N), logits)
        for part in reversed(parts):
            if part is parts[-1]:
                probs = logits[: part.stop - part.start].mul_((local_max_N - lse_N)[part, None].exp())
            else:
                probs = product(hidden_NH[part], logits).sub_(lse_N[part, None]).exp_()
            probs = probs.scatter_add_(1, own_N[part, None], one_N1[part]).to(weight_VH.dtype)
            torch.mm(probs, weight_VH, out=grad_hidden_NH[part])
            add_product(grad_weight_VH, probs, (hidden_NH[part] * scale_N1[part]).to(weight_VH.dtype))
        grad_hidden_NH *= scale_N1.to(hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None


class LogitProduct:
    """``hidden @ weight.T`` into a buffer, in fp32 whatever the inputs: bf16 would round off up to 0.4 % of a logit."""

    def __init__(self, weight_VH: Tensor, real_rows: int) -> None:
        self.real_rows = real_rows
        # Only CUDA has a product of bf16 with an fp32 result.
        self.on_cpu = weight_VH.device.type == "cpu"
        self.weight_HV = (weight_VH.float() if self.on_cpu else weight_VH).t()

    def __call__(self, hidden_CH: Tensor, out: Tensor) -> Tensor:
        """fp32 ``[C, V]``, a view of ``out``; rows of the weight that only pad the vocabulary get no probability."""
        logits = out[: len(hidden_CH)]
        if self.on_cpu or hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH.float(), self.weight_HV, out=logits)
        else:
            torch.mm(hidden_CH, self.weight_HV, out_dtype=torch.float32, out=logits)
        if self.real_rows < logits.shape[1]:
            # Finite: on a rank whose rows are all padding, minus infinity less its maximum would be no number.
            logits[:, self.real_rows :] = torch.finfo(torch.float32).min
        return logits


def add_product(total_VH: Tensor, probs_CV: Tensor, scaled_CH: Tensor) -> None:
    """Add ``probs.T @ scaled`` to an fp32 total."""
    if scaled_CH.dtype == torch.float32:
        total_VH.addmm_(probs_CV.t(), scaled_CH)
    elif total_VH.is_cuda and _adds_to_fp32(total_VH.device):
        torch.addmm(total_VH, probs_CV.t(), scaled_CH, out_dtype=torch.float32, out=total_VH)
    elif total_VH.is_cuda:
        total_VH += torch.mm(probs_CV.t(), scaled_CH, out_dtype=torch.float32)
    else:
        total_VH += torch.mm(probs_CV.t(), scaled_CH)


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether a product of bf16 can be added to an fp32 total as it is made; before pytorch#167931 it cannot."""
    total, ones = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def over_shares(
    max_N: Tensor, sum_N: Tensor, label_N: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the shares of a vocabulary make together; equal on every rank of the group.

    Args:
        max_N: The largest logit of each token in this rank's share, fp32 ``[N]``; left as it is.
        sum_N: The sum of ``exp(logit - max)`` in the share.
        label_N: The label's logit, 0 where it is in another rank's share.
        group: The tensor-parallel group, ``None`` for one process.

    Returns:
        The same three of the whole vocabulary.
    """
    if group is None or group.size() == 1:
        return max_N, sum_N, label_N
    whole_N = max_N.clone()
    dist.all_reduce(whole_N, dist.ReduceOp.MAX, group)
    sums_2N = torch.stack([sum_N * (max_N - whole_N).exp(), label_N])
    dist.all_reduce(sums_2N, group=group)
    return whole_N, sums_2N[0], sums_2N[1]


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
    return _TokenLogProbs.apply(hidden_NH, weight_VH, labels_N, real_rows(weight_VH, vocab_size, group), group)


def real_rows(weight_VH: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> int:
    """How many of this rank's rows of the output layer are vocabulary; the rest pads it."""
    rank = 0 if group is None else group.rank()
    return min(max(vocab_size - rank * len(weight_VH), 0), len(weight_VH))
