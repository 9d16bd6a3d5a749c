r"""The clipped importance-sampling loss of sampled tokens (cross-tokenizer OPD, equation 10).

.. math::
    L = -\frac{1}{N}\sum_i \min\bigl(\rho_i A_i,\ \mathrm{clip}(\rho_i, 1-\epsilon_{low}, 1+\epsilon_{high})\,A_i\bigr),
    \qquad \rho_i = \exp(l_i - l_i^{old})

with the bound of Ye et al. 2020 on negative advantages (dual clip) that its release sets. Everything here is a sum over
tokens and a count of them: the mean is over the global batch, so the division waits for the sums of all microbatches
and ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """Bounds on the importance ratio, by default the release's.

    Attributes:
        low: Ratios count down to ``1 - low``.
        high: Ratios count up to ``1 + high``.
        dual: With a negative advantage a token costs at most ``dual`` times it; above ``1 + high``.
        engine: The weight between the engine that sampled and the model that trains is at most this (truncated
            importance sampling, Yao et al. 2025).
    """

    low: float = 0.2
    high: float = 0.28
    dual: float = 10.0
    engine: float = 2.0


@dataclass(frozen=True)
class ClippedLoss:
    """Sums over the tokens of a microbatch; all but the first are detached.

    Attributes:
        total: The loss, a differentiable scalar.
        tokens: How many tokens count.
        clipped: How many of them have a clipped ratio, and so no gradient.
    """

    total: Tensor
    tokens: Tensor
    clipped: Tensor


def clipped_loss(
    policy_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    counts_T: Tensor,
    clipping: Clipping,
    engine_T: Tensor | None = None,
) -> ClippedLoss:
    """The loss of one microbatch's sampled tokens.

    Args:
        policy_T: Log-prob of each token under the policy, fp32 ``[T]``.
        old_T: The same under the policy that the step began with; detached. Equal to ``policy_T`` where a rollout is
            trained on once, in which case the ratio is 1 and its gradient that of the log-prob.
        advantages_T: Advantage of each token, fp32 ``[T]``.
        counts_T: Whether a token counts, bool ``[T]``; others are in neither sum nor count, whatever they hold.
        clipping: The bounds.
        engine_T: Log-prob of each token as the engine sampled it, ``[T]``, where that is another program than the one
            that trains: the loss of a token is weighted by ``min(exp(old - engine), clipping.engine)``.
    """
    zero_T = torch.zeros_like(policy_T)
    ratio_T = torch.exp(torch.where(counts_T, policy_T - old_T.detach(), zero_T))
    advantages_T = torch.where(counts_T, advantages_T.detach(), zero_T)
    bounded_T = ratio_T.clamp(1 - clipping.low, 1 + clipping.high)
    gain_T = torch.minimum(ratio_T * advantages_T, bounded_T * advantages_T)
    floored_T = torch.where(advantages_T < 0, torch.maximum(gain_T, clipping.dual * advantages_T), gain_T)
    clipped_T = (floored_T != ratio_T * advantages_T) & counts_T
    loss_T = -floored_T
    if engine_T is not None:
        loss_T = loss_T * engine_weights(old_T, engine_T, counts_T, clipping.engine)
    return ClippedLoss(loss_T.sum(), counts_T.sum(), clipped_T.sum())


def engine_weights(old_T: Tensor, engine_T: Tensor, counts_T: Tensor, most: float) -> Tensor:
    """What a token's loss is weighted by where another program sampled it, fp32 ``[T]``, detached: 1 where it does not
    count."""
    drift_T = torch.where(counts_T, (old_T - engine_T).detach(), 0.0)
    return torch.exp(drift_T).clamp(max=most)
