"""Multi-Level Optimal Transport (Cui et al. 2025); the loss is ``losses.optimal_transport``."""

from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.optimal_transport import absolute_difference, logarithmic_cost, sinkhorn_distance
from ctpd_nemo.losses.top_logprobs import top_logprobs
from ctpd_nemo.losses.uld import paired_rows
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.distillation import DistillationConfig, DistillationModel, Terms, check_positive, tensor_group
from ctpd_nemo.models.response_states import ResponseStates


@dataclass
class MultiLevelOTConfig(DistillationConfig):
    """Multi-Level OT; the values are those of the authors' release, where it has one that means the same.

    Attributes:
        distillation_weight: ``alpha``, of all that is beside the cross-entropy.
        top_k: ``k``, probabilities of each token that are compared.
        logarithmic_weight: ``beta``, of the logarithmic cost beside the absolute difference.
        sequence_weight: ``gamma``, of the sequence level beside the absolute difference.
        epsilon: Strength of the entropy of the sequence level's plan.
        iterations: Sinkhorn iterations.
    """

    name: str = "multilevel_ot"
    distillation_weight: float = 1.5
    top_k: int = 50
    logarithmic_weight: float = 0.1
    sequence_weight: float = 0.1
    epsilon: float = 0.1
    iterations: int = 10

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        super().check()
        check_positive(self, "distillation_weight", "epsilon")
        for name in ("top_k", "iterations"):
            if getattr(self, name) < 1:
                raise InputError(f"method.{name}", str(getattr(self, name)), "1 or more")
        for name in ("logarithmic_weight", "sequence_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"method.{name}", str(getattr(self, name)), "0 or more")


class MultiLevelOT(DistillationModel):
    """Cross-entropy, and the costs of moving the student's largest probabilities to the teacher's."""

    def __init__(self, run: RunConfig, run_data: RunData, trainer: Trainer | None = None) -> None:
        """Args as those of ``MegatronModel``."""
        super().__init__(run, run_data, trainer)
        self.check_k(run.method.top_k, "method.top_k")

    def terms(self, student: ResponseStates, microbatch: Microbatch) -> Terms:
        """Token level over the tokens of equal number, sequence level over each whole response."""
        method = self.run.method
        label_N, top_NK, _ = top_logprobs(
            student.hidden_NH, student.weight_VH, student.labels_N, method.top_k, student.vocab_size, tensor_group()
        )
        teacher = self.teacher_top_k(microbatch, method.top_k)
        rows_N = paired_rows(student.lengths_R, teacher.lengths_R)
        paired_NK, target_NK = top_NK[rows_N >= 0], teacher.top_MK[rows_N[rows_N >= 0]].exp()
        distance = absolute_difference(paired_NK.exp(), target_NK).sum()
        if method.logarithmic_weight:
            distance = distance + method.logarithmic_weight * logarithmic_cost(paired_NK, target_NK).sum()
        if method.sequence_weight:
            sequences = self._sequence_level(top_NK.exp(), student.lengths_R, teacher.top_MK.exp(), teacher.lengths_R)
            distance = distance + method.sequence_weight * sequences
        entropy = -label_N.sum()
        return Terms(entropy + method.distillation_weight * distance, entropy.detach(), distance.detach())

    def _sequence_level(self, student_NK: Tensor, student_R: Tensor, teacher_MK: Tensor, teacher_R: Tensor) -> Tensor:
        """The sum of the responses' distances."""
        sides = student_NK.split(student_R.tolist()), teacher_MK.split(teacher_R.tolist())
        total = student_NK.new_zeros(())
        for student_nK, teacher_mK in zip(*sides, strict=True):
            if len(student_nK) and len(teacher_mK):
                distance = sinkhorn_distance(
                    student_nK, teacher_mK, self.run.method.epsilon, self.run.method.iterations
                )
                total = total + distance
        return total
