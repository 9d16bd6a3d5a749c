r"""The DPO-style loss of CTPD, and DPO as its special case.

.. math::
    r(x, y) &= \sum_s w_s \, (\log\pi_\theta(s) - \log\pi_{ref}(s)) \\
    L &= -\log\sigma(\beta\,(r(x, y_w) - r(x, y_l)))

(CTPD, section 3.3). With unit weights and a reference on the policy's own tokens this is DPO (Rafailov et al. 2023,
equation 7): the sum over spans is then the sum over tokens.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ctpd_nemo.losses.spans import sum_by


@dataclass(frozen=True)
class PreferenceLoss:
    """What one microbatch gives.

    Attributes:
        total: The sum of the pairs' losses, a differentiable scalar.
        pair: The loss of each pair, ``[P]``, detached as all below.
        margin: ``beta * (r(chosen) - r(rejected))``, ``[P]``.
        chosen_reward: ``beta * r(chosen)``, ``[P]``.
        rejected_reward: ``beta * r(rejected)``, ``[P]``.
    """

    total: Tensor
    pair: Tensor
    margin: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def preference_loss(
    policy_S: Tensor,
    reference_S: Tensor,
    weights_S: Tensor,
    response_S: Tensor,
    chosen_P: Tensor,
    rejected_P: Tensor,
    beta: float,
) -> PreferenceLoss:
    """The loss of the pairs of a microbatch.

    The difference to the reference is taken span by span before anything is summed: two nearly equal models then give
    nearly zero, where the difference of two long sums would keep their rounding.

    Args:
        policy_S: Log-prob of each span under the policy, fp32 ``[S]``.
        reference_S: The same under the reference.
        weights_S: Importance weight of each span.
        response_S: The response of each span, integer ``[S]``.
        chosen_P: The chosen response of each pair, integer ``[P]``.
        rejected_P: The rejected response of each pair, integer ``[P]``.
        beta: Strength of the pull to the reference.
    """
    num_responses = 2 * len(chosen_P)
    reward_R = beta * sum_by(weights_S * (policy_S - reference_S), response_S, num_responses)
    chosen, rejected = reward_R[chosen_P], reward_R[rejected_P]
    pair = -F.logsigmoid(chosen - rejected)
    return PreferenceLoss(
        total=pair.sum(),
        pair=pair.detach(),
        margin=(chosen - rejected).detach(),
        chosen_reward=chosen.detach(),
        rejected_reward=rejected.detach(),
    )
