"""What DPO and CTPD share: the loss over spans, its metrics, and a reference beside the policy."""

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.losses.histogram import N_BINS, named_counts, weight_counts
from ctpd_nemo.losses.preference import preference_loss
from ctpd_nemo.losses.spans import sum_by
from ctpd_nemo.models.base import MegatronModel
from ctpd_nemo.models.forward import StepLoss
from ctpd_nemo.parallel.layout import local_device


class PreferenceModel(MegatronModel):
    """A model trained on pairs against a reference, with a weight a span.

    Attributes:
        weighs_spans: Whether weights can be other than 1.
    """

    weighs_spans: ClassVar[bool] = False

    metric_names = (
        "loss",
        "accuracy",
        "margin",
        "reward_chosen",
        "reward_rejected",
        "logprob_chosen",
        "logprob_rejected",
    )
    shown_metrics = ("loss", "margin", "accuracy")

    @property
    @abstractmethod
    def beta(self) -> float:
        """Strength of the pull to the reference."""

    def pair_ends(self, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """The preferred and the other response of each pair, int32 ``[P]``."""
        return microbatch.chosen, microbatch.rejected

    def weight_histogram(self, batch: StepBatch) -> dict[str, dict[str, int]]:
        """Counts of span weights over the whole batch of all data-parallel ranks, equal on every rank of the job."""
        if not self.weighs_spans:
            return {}
        counts = torch.zeros(2, N_BINS, dtype=torch.long, device=local_device())
        # Where weights are computed as training goes, the last stage has them; its other ranks hold copies.
        if (
            dist.get_rank() == parallel_state.get_pipeline_model_parallel_last_rank()
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        ):
            for microbatch in batch.microbatches:
                counts += weight_counts(microbatch.span_weights, microbatch.span_response, microbatch.rejected)
        dist.all_reduce(counts)
        return named_counts(counts)

    def microbatch_loss(self, policy_S: Tensor, microbatch: Microbatch) -> StepLoss:
        """The sum of the pairs' losses; counted in pairs."""
        response_S = microbatch.span_response.long()
        preferred_P, other_P = (end.long() for end in self.pair_ends(microbatch))
        loss = preference_loss(
            policy_S,
            microbatch.reference_logprobs,
            microbatch.span_weights,
            response_S,
            preferred_P,
            other_P,
            self.beta,
        )
        logprob_R = sum_by(policy_S.detach(), response_S, microbatch.num_responses)
        sums = {
            "loss": loss.pair.sum(),
            "accuracy": (loss.margin > 0).sum(),
            "margin": loss.margin.sum(),
            "reward_chosen": loss.chosen_reward.sum(),
            "reward_rejected": loss.rejected_reward.sum(),
            "logprob_chosen": logprob_R[preferred_P].sum(),
            "logprob_rejected": logprob_R[other_P].sum(),
        }
        return StepLoss(loss.total, microbatch.num_pairs, sums, dict.fromkeys(sums, microbatch.num_pairs))
