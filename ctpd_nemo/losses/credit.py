r"""Credit: how the difference between teacher and student on a chunk is shared out over its sampled tokens.

With :math:`l_i` the student's log-prob of sampled token i, :math:`L_S` their sum over a chunk of n tokens, and
:math:`L_T` the teacher's log-prob of the same bytes in its own tokens, the paper's target of a token is
:math:`(L_T / L_S)\,l_i` and its advantage :math:`A_i = (L_T / L_S)\,l_i - l_i` (cross-tokenizer OPD, equations 8 and
9). That is a share of the chunk's difference,

.. math::
    A_i = w_i D, \qquad D = L_T - L_S, \qquad w_i = l_i / L_S

and written so it has neither a division by a small number nor a cancellation: shares lie between 0 and 1 and sum to 1,
so the advantages of a chunk sum to D and none is larger. What is clamped is D, so shares stay shares.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ctpd_nemo.losses.spans import sum_by

CreditRule = Literal["semantic", "chunk", "uniform"]
CREDIT_RULES: tuple[CreditRule, ...] = ("semantic", "chunk", "uniform")

# Moves the shares of tokens that are certain (log-prob 0) to equal ones, without a branch; others by its own size.
_SMOOTHING = 1e-6


def token_advantages(
    student_logps: Tensor,
    chunk: Tensor,
    teacher_chunk_logps: Tensor,
    rule: CreditRule = "semantic",
    limit: float = 10.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The advantage of each sampled token.

    Args:
        student_logps: Log-prob of each sampled token under the policy that is trained, fp32 ``[T]``; it is detached.
        chunk: The chunk of each token, int64 ``[T]``; -1 for tokens in none, whose advantage is 0.
        teacher_chunk_logps: The teacher's log-prob of each chunk, fp32 ``[C]``; ``-inf`` where it finds one impossible.
        rule: How a chunk's difference goes to its tokens: "semantic" in proportion to their log-probs (the paper's);
            "uniform" in equal parts; "chunk" all of it to each, which is the gradient of the chunk's reverse KL, as
            the gradient of a sum of log-probs is the sum of the tokens' gradients. All agree on chunks of one token.
        limit: The difference of a chunk is clamped to ``[-limit, limit]``, in nats (the release's value is 10).
        group: Context-parallel group over which the tokens of one chunk may be spread.

    Returns:
        fp32 ``[T]``, without a gradient.

    Raises:
        ValueError: An unknown rule.
    """
    if rule not in CREDIT_RULES:
        raise ValueError(f"credit rule {rule!r}: one of {', '.join(CREDIT_RULES)}")
    if not len(teacher_chunk_logps):
        return torch.zeros_like(student_logps, dtype=torch.float32)
    clamped_C = _difference(student_logps, chunk, teacher_chunk_logps, group).clamp(-limit, limit)
    shares_T = _shares(student_logps.detach().double(), chunk, len(teacher_chunk_logps), rule, group)
    advantages_T = torch.where(chunk >= 0, shares_T * clamped_C[chunk.clamp(min=0)], 0.0)
    return advantages_T.float()


def clamped_chunks(
    student_logps: Tensor,
    chunk: Tensor,
    teacher_chunk_logps: Tensor,
    limit: float = 10.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Which chunks :func:`token_advantages` clamps, bool ``[C]``."""
    return _difference(student_logps, chunk, teacher_chunk_logps, group).abs() > limit


def _difference(student_T: Tensor, chunk_T: Tensor, teacher_C: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``L_T - L_S`` of each chunk, in double precision: a chunk of many tokens sums to within an ulp of fp32."""
    return teacher_C.detach().double() - _chunk_sums(student_T.detach().double(), chunk_T, len(teacher_C), group)


def _chunk_sums(values_T: Tensor, chunk_T: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sums by chunk, ``[C]``; tokens in no chunk are in none."""
    in_chunk_T = (chunk_T >= 0).to(values_T.dtype)
    return sum_by(values_T * in_chunk_T, chunk_T.clamp(min=0), max(size, 1), group)[:size]


def _shares(student_T: Tensor, chunk_T: Tensor, size: int, rule: CreditRule, group: dist.ProcessGroup | None) -> Tensor:
    """The share of each token in its chunk's difference, ``[T]``; 1 for each under "chunk"."""
    if rule == "chunk":
        return torch.ones_like(student_T)
    # Of equal parts, and of parts that grow with how surprising a token is: the second tends to the first.
    parts_T = torch.ones_like(student_T) if rule == "uniform" else student_T - _SMOOTHING
    return parts_T / _chunk_sums(parts_T, chunk_T, size, group)[chunk_T.clamp(min=0)]
