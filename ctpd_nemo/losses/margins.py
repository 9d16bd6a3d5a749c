r"""Log-probs of labels beside that of the best other token, over a vocabulary-parallel output layer; forward only.

The difference of the two, :math:`\log p(y) - \max_{v \ne y} \log p(v)`, is the margin by which a model would say the
token rather than its own best other choice: above zero where it would have said it. As in ``logprobs`` the logits exist
for one chunk of tokens at a time.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ctpd_nemo.losses.logprobs import LogitProduct, logit_buffer, over_shares, real_rows, token_chunks


@torch.no_grad()
def label_and_best_other(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, vocab_size: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of labels, and of the likeliest token that is not the label.

    Args:
        hidden_NH: Hidden states at the positions that predict a label, ``[N, H]``, equal on every rank of the group.
        weight_VH: This rank's rows of the output layer, ``[V, H]``; rank ``r`` holds rows ``r * V`` and up.
        labels_N: int64 ``[N]`` in ``[0, vocab_size)``.
        vocab_size: Rows of the whole weight that are vocabulary, 2 or more; the rest is padding.
        group: The tensor-parallel group, ``None`` for one process.

    Returns:
        Twice fp32 ``[N]``, without gradient, equal on every rank of the group.
    """
    own_N = labels_N - (0 if group is None else group.rank()) * len(weight_VH)
    mine_N = (own_N >= 0) & (own_N < len(weight_VH))
    own_N = own_N.masked_fill(~mine_N, 0)
    other_N, sum_N, label_N = hidden_NH.new_empty((3, len(labels_N)), dtype=torch.float32).unbind()
    logits = logit_buffer(len(labels_N), weight_VH)
    product = LogitProduct(weight_VH, real_rows(weight_VH, vocab_size, group))
    nothing = torch.finfo(torch.float32).min
    for part in token_chunks(len(labels_N), logits):
        chunk, column_N1 = product(hidden_NH[part], logits), own_N[part, None]
        label_N[part] = chunk.gather(1, column_N1).squeeze(1)
        # The label leaves the others; where it is another rank's, all of these stay.
        chunk.scatter_(1, column_N1, label_N[part].masked_fill(mine_N[part], nothing)[:, None])
        torch.amax(chunk, 1, out=other_N[part])
        torch.sum(chunk.sub_(other_N[part, None]).exp_(), 1, out=sum_N[part])
    label_N.masked_fill_(~mine_N, 0.0)
    other_N, sum_N, label_N = over_shares(other_N, sum_N, label_N, group)
    lse_N = torch.logaddexp(sum_N.log().add_(other_N), label_N)
    return label_N - lse_N, other_N - lse_N
