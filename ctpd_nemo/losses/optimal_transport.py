r"""Multi-Level Optimal Transport between the largest probabilities of two models (Cui et al. 2025).

.. math::
    L &= \sum_t CE(t) + \alpha \, (L_{HAD} + \beta L_{SL} + \gamma L_{SD}) \\
    L_{HAD} &= \sum_t \sum_{i \le k} | q_{(i)}(t) - p_{(i)}(t) |, \qquad
    L_{SL} = - \sum_t \sum_{i \le k} q_{(i)}(t) \log p_{(i)}(t) \\
    L_{SD} &= \langle P, C \rangle, \qquad C_{ij} = \sum_{u \le k} | p_{(u)}(i) - q_{(u)}(j) |

with the student's probabilities p and the teacher's q in descending order and cut after the k largest. The plan P of
the sequence level comes from Sinkhorn's iterations on :math:`e^{-C / \varepsilon}`.

Where paper and release differ:

- The paper ranks words once a sequence, by their sums over its tokens. The release (github.com/2018cx/Multi-Level-OT,
  ``models/distillation_model.py``) ranked them at each token anew, so that its sums changed nothing, up to its commit
  712cfb4 of 2026-02-04; since then it ranks them once a batch, by sums over the tokens of all its responses and their
  filling, so that the loss of a response depends on what it is batched with. Here they are ranked at each token, as in
  the release before: the teacher's k largest of each token are all that this asks for.
- The release divides logits by their standard deviation over the vocabulary first, and takes the logarithmic cost and
  the sequence level on softmaxes of probabilities, with the sides of the former swapped. Here costs are of the
  probabilities, as the paper's formulas have them.
- The release fills the sequences of a batch up to equal lengths, and the filling takes part in the plan. Here each
  response has a plan of its own, over its n tokens of the student and m of the teacher: rows have a mass of 1, columns
  of n / m; with n = m that is the doubly stochastic plan of both.
- Sums over tokens are divided by the tokens of the global batch; the release takes means over tokens and responses,
  but of the sequence level a thousandth of the sum, so that :math:`\gamma` there and here mean other things.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def absolute_difference(student_CK: Tensor, teacher_CK: Tensor) -> Tensor:
    """The holistic absolute difference of each token, ``[C]``; both sides are probabilities, fp32 ``[C, K]``."""
    return (teacher_CK - student_CK).abs().sum(dim=1)


def logarithmic_cost(student_CK: Tensor, teacher_CK: Tensor) -> Tensor:
    """The sequential logarithmic cost of each token, ``[C]``.

    Args:
        student_CK: Log-probs of the student's K largest in descending order, fp32 ``[C, K]``.
        teacher_CK: Probabilities of the teacher's.
    """
    return -(teacher_CK * student_CK).sum(dim=1)


def transport_plan(cost_NM: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn's plan between N and M tokens: columns hold N / M exactly, rows 1 as nearly as the iterations bring it.

    Args:
        cost_NM: fp32 ``[N, M]``.
        epsilon: Strength of the entropy; small ones come near to the cheapest plan.
        iterations: How often rows and then columns are given their masses.
    """
    log_column = math.log(len(cost_NM) / cost_NM.shape[1])
    log_plan_NM = -cost_NM / epsilon
    for _ in range(iterations):
        log_plan_NM = log_plan_NM - log_plan_NM.logsumexp(dim=1, keepdim=True)
        log_plan_NM = log_plan_NM - log_plan_NM.logsumexp(dim=0, keepdim=True) + log_column
    return log_plan_NM.exp()


def sinkhorn_distance(student_NK: Tensor, teacher_MK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """What it costs to bring the tokens of one response to the other tokenization of it, a differentiable scalar.

    The iterations are done again in the backward pass, so that only one response's are kept.

    Args:
        student_NK: The student's K largest probabilities at each token, fp32 ``[N, K]``.
        teacher_MK: The teacher's, ``[M, K]``.
        epsilon: See ``transport_plan``.
        iterations: Likewise.
    """

    def distance(student_NK: Tensor) -> Tensor:
        cost_NM = torch.cdist(student_NK, teacher_MK, p=1)
        return (transport_plan(cost_NM, epsilon, iterations) * cost_NM).sum()

    return checkpoint(distance, student_NK, use_reentrant=False)
