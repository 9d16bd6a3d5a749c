"""Universal Logit Distillation (Boizard et al. 2024); the loss is ``losses.uld``."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.top_logprobs import top_logprobs
from ctpd_nemo.losses.uld import paired_rows, sorted_distance, truncated_distance
from ctpd_nemo.losses.whole_logits import WholeLogits, loss_of_logits
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.distillation import DistillationConfig, DistillationModel, Terms, check_positive, tensor_group
from ctpd_nemo.models.response_states import ResponseStates


@dataclass
class ULDConfig(DistillationConfig):
    """ULD; 1.5 is the weight of the authors' release.

    Attributes:
        distillation_weight: ``lambda``, of the distance beside the cross-entropy.
        top_k: Compare so many of the largest probabilities and the sum of the others; ``None`` for whole
            distributions, as in the paper, or with a cache for as many as it has.
    """

    name: str = "uld"
    distillation_weight: float = 1.5
    top_k: int | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        super().check()
        check_positive(self, "distillation_weight")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("method.top_k", str(self.top_k), "1 or more, or null")


class ULD(DistillationModel):
    """Cross-entropy and the distance between the sorted distributions of the t-th tokens of both sides."""

    def __init__(self, run: RunConfig, run_data: RunData, trainer: Trainer | None = None) -> None:
        """Args as those of ``MegatronModel``."""
        super().__init__(run, run_data, trainer)
        self.top_k: int | None = run.method.top_k
        if self.top_k is None and run.method.reference == "cache" and run_data.top_k is not None:
            self.top_k = min(run_data.top_k.k, *self.vocab_sizes)
        if self.top_k is not None:
            self.check_k(self.top_k, "method.top_k")

    def terms(self, student: ResponseStates, microbatch: Microbatch) -> Terms:
        """Of whole distributions, or of the largest probabilities."""
        if self.top_k is None:
            return self._whole(student, microbatch)
        label_N, top_NK, _ = top_logprobs(
            student.hidden_NH, student.weight_VH, student.labels_N, self.top_k, student.vocab_size, tensor_group()
        )
        teacher = self.teacher_top_k(microbatch, self.top_k)
        rows_N = paired_rows(student.lengths_R, teacher.lengths_R)
        paired_N, rows = rows_N >= 0, rows_N[rows_N >= 0]
        distance = truncated_distance(top_NK[paired_N].exp(), teacher.top_MK[rows].exp(), teacher.tail_M[rows]).sum()
        entropy = -label_N.sum()
        return Terms(entropy + self.run.method.distillation_weight * distance, entropy.detach(), distance.detach())

    def _whole(self, student: ResponseStates, microbatch: Microbatch) -> Terms:
        group, weight = tensor_group(), self.run.method.distillation_weight
        teacher = self.teacher_states(microbatch)
        read_teacher = WholeLogits(teacher.weight_VH, teacher.vocab_size, group)
        rows_N = paired_rows(student.lengths_R, teacher.lengths_R)

        def sums(logits_CV: Tensor, part: slice) -> Tensor:
            logprobs_CV = logits_CV.log_softmax(dim=1)
            entropy = F.nll_loss(logprobs_CV, student.labels_N[part], reduction="sum")
            paired_C = rows_N[part] >= 0
            with torch.no_grad():
                target_CV = read_teacher(teacher.hidden_NH[rows_N[part][paired_C]]).softmax(dim=1)
            distance = sorted_distance(logprobs_CV[paired_C].exp(), target_CV).sum()
            return torch.stack([entropy + weight * distance, entropy, distance])

        total, sums_3 = loss_of_logits(sums, 3, student.hidden_NH, student.weight_VH, student.vocab_size, group)
        return Terms(total, sums_3[1], sums_3[2])
