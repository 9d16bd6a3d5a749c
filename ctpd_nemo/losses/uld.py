r"""Universal Logit Distillation: the Wasserstein distance between two models' sorted next-token distributions.

.. math::
    L = \sum_{t=1}^{n} CE(t) + \lambda \sum_{t=1}^{\min(n, m)} \sum_{i=1}^{\max(V_S, V_T)}
        \left| p_{(i)}(t) - q_{(i)}(t) \right|

(Boizard et al. 2024, equation 3 and its closed form for equal costs), with the student's probabilities p and the
teacher's q in descending order, the shorter vocabulary padded with zeros, and the t-th tokens of the two tokenizations
of a response compared with each other. The sums over tokens are the paper's. The authors' release takes means over the
tokens of a response and then over responses, which weighs tokens of short responses more; here all are divided by the
tokens of the global batch, as in supervised fine-tuning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sorted_distance(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """The distance of each token, ``[C]``.

    Args:
        student_CV: Probabilities under the student, fp32 ``[C, V_S]``, in any order.
        teacher_CV: The same under the teacher, ``[C, V_T]``.
    """
    width = max(student_CV.shape[1], teacher_CV.shape[1])
    student_CV, teacher_CV = (
        F.pad(probs.sort(dim=1, descending=True).values, (0, width - probs.shape[1]))
        for probs in (student_CV, teacher_CV)
    )
    return (student_CV - teacher_CV).abs().sum(dim=1)


def truncated_distance(student_CK: Tensor, teacher_CK: Tensor, teacher_tail_C: Tensor) -> Tensor:
    """The distance of each token where only the K largest probabilities are known, and the sum of the others, ``[C]``.

    The rest of each distribution is one more word. The distance is never above that of the whole distributions, and
    equals it where K is the smaller vocabulary.

    Args:
        student_CK: The student's K largest probabilities in descending order, fp32 ``[C, K]``.
        teacher_CK: The teacher's.
        teacher_tail_C: What the teacher's others add up to, ``[C]``.
    """
    tail_C = 1 - student_CK.sum(dim=1)
    return (student_CK - teacher_CK).abs().sum(dim=1) + (tail_C - teacher_tail_C).abs()


def paired_rows(student_R: Tensor, teacher_R: Tensor) -> Tensor:
    """For each response token of the student the teacher's token of the same number in that response.

    Args:
        student_R: Tokens of each response on the student's side, int64 ``[R]``.
        teacher_R: The same on the teacher's side.

    Returns:
        int64 ``[N]``, rows among the teacher's response tokens; -1 where the teacher's response is over by then.
    """
    response_N = torch.repeat_interleave(student_R)
    number_N = torch.arange(len(response_N), device=student_R.device) - starts(student_R)[response_N]
    rows_N = starts(teacher_R)[response_N] + number_N
    return torch.where(number_N < teacher_R[response_N], rows_N, -1)


def starts(lengths_R: Tensor) -> Tensor:
    """Where each of several runs laid end to end begins, int64 ``[R]``."""
    return lengths_R.cumsum(0) - lengths_R
