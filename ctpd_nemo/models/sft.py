"""Supervised fine-tuning on the chosen responses."""

from dataclasses import dataclass

from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.base import MegatronModel
from ctpd_nemo.models.forward import StepLoss


@dataclass
class SFTConfig:
    """SFT has nothing to choose."""

    name: str = "sft"


class SFT(MegatronModel):
    """Cross-entropy of the chosen responses, the mean over their tokens in the global batch."""

    metric_names = ("loss",)
    shown_metrics = ("loss",)

    def microbatch_loss(self, policy_S: Tensor, microbatch: Microbatch) -> StepLoss:
        """Minus the sum of the log-probs; counted in tokens."""
        total = -policy_S.sum()
        count = (microbatch.labels >= 0).sum()
        return StepLoss(total, count, {"loss": total.detach()}, {"loss": count})
