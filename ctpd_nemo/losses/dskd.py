r"""Dual-space distillation with cross-model attention (Zhang et al. 2024, section 3; 2025 has the framework at large).

Each model's hidden states are brought into the other's space, where its own output layer reads them. For two
tokenizations of a response, n tokens of the student and m of the teacher, attention says which belong together:

.. math::
    Q &= P_{query}([e^S_{in}; e^S_{out}]), \quad K = N([e^T_{in}; e^T_{out}]), \quad
    A = Q K^\top / \sqrt{2 H_T} \\
    h^{T \to S} &= softmax_m(A) \, P_{t2s}(N(h^T) + N(e^T_{out})), \qquad
    h^{S \to T} = softmax_n(A^\top) \, P_{s2t}(h^S)

with embeddings e of a token's input and label, the final hidden states h, and N, which divides by the standard
deviation. With the output layers W held fixed where the formula underlines them,

.. math::
    L_{KD} = \sum_n CE(h^{T \to S} \underline{W_S}) + \sum_n a_n \, KL(\underline{h^{T \to S} W_S} \,\|\, h^S W_S)
        + \sum_m KL(\underline{h^T W_T} \,\|\, h^{S \to T} \underline{W_T}),

where :math:`a_n` is 1 where the first distribution's largest word is the label, else 0, and both divergences are of
logits divided by a temperature. The loss is :math:`(1 - r) \, CE + r \, L_{KD}`.

This follows the authors' release but in one point: there N is over a whole batch, its padding and prompts included, so
that the loss of a response depends on what it is batched with. Here it is over the tokens of the response.
"""

import math

import torch
from torch import Tensor, nn

PROJECTORS = "projectors"


class Projectors(nn.Module):
    """The three maps between the spaces, trained with the student and of no use without the teacher."""

    def __init__(self, student_size: int, teacher_size: int, seed: int, dtype: torch.dtype) -> None:
        """Draw the weights as ``nn.Linear`` does, from a seed: alike on every rank and in every layout.

        Args:
            student_size: ``H_S``.
            teacher_size: ``H_T``.
            seed: Of the weights.
            dtype: Of the weights.
        """
        super().__init__()
        self.query = nn.Linear(2 * student_size, 2 * teacher_size, dtype=dtype, device="cpu")
        self.s2t = nn.Linear(student_size, teacher_size, dtype=dtype, device="cpu")
        self.t2s = nn.Linear(teacher_size, student_size, dtype=dtype, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.query, self.s2t, self.t2s):
                bound = layer.in_features**-0.5
                for parameter in (layer.weight, layer.bias):
                    drawn = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)


def unit_deviation(values_ND: Tensor) -> Tensor:
    """Values divided by the standard deviation of all of them, fp32 ``[N, D]``."""
    values_ND = values_ND.float()
    return values_ND / values_ND.std() if values_ND.numel() > 1 else values_ND


def cross_attention(
    query_NE: Tensor, key_ME: Tensor, student_value_NT: Tensor, teacher_value_MS: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states of one response in the other model's space.

    Args:
        query_NE: Projected embeddings of the student's tokens, fp32 ``[N, 2 H_T]``.
        key_ME: Embeddings of the teacher's tokens, fp32 ``[M, 2 H_T]``.
        student_value_NT: Projected hidden states of the student, ``[N, H_T]``.
        teacher_value_MS: Projected hidden states of the teacher, ``[M, H_S]``.

    Returns:
        The teacher in the student's space ``[N, H_S]``, the student in the teacher's space ``[M, H_T]``; fp32.
    """
    scores_NM = query_NE @ key_ME.t() / math.sqrt(key_ME.shape[1])
    return scores_NM.softmax(dim=1) @ teacher_value_MS, scores_NM.t().softmax(dim=1) @ student_value_NT


def divergence(target_CV: Tensor, logits_CV: Tensor, temperature: float) -> Tensor:
    """``KL(target || softmax(logits))`` of each token at a temperature, ``[C]``; both are logits, fp32 ``[C, V]``."""
    target_CV = (target_CV / temperature).log_softmax(dim=1)
    return (target_CV.exp() * (target_CV - (logits_CV / temperature).log_softmax(dim=1))).sum(dim=1)
