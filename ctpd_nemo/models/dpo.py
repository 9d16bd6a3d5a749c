"""Direct Preference Optimization, forward and reverse: the contrastive teacher pair, and a baseline."""

import math
from dataclasses import dataclass

from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.preference import PreferenceModel
from ctpd_nemo.models.teacher import FrozenModel


@dataclass
class DPOConfig:
    """DPO.

    Attributes:
        beta: Strength of the pull to the reference; 0.3 for the paper's contrastive pair.
        reverse: Prefer the rejected response: trains the negative teacher.
        reference: "online" keeps the starting weights beside the policy; "cache" reads ``scores``.
        scores: Span score cache of the starting weights on their own tokens, where ``reference`` is "cache".
        scoring_precision: The precision those scores were computed in; ``None`` for that of this run.
    """

    name: str = "dpo"
    beta: float = 0.1
    reverse: bool = False
    reference: str = "online"
    scores: str | None = None
    scoring_precision: str | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        check_beta(self.beta)
        check_reference(self.reference, self.scores)


def check_beta(beta: float) -> None:
    """Stop with an ``InputError`` where beta would turn the preference round, or make nothing of it."""
    if not 0 < beta < math.inf:
        raise InputError("method.beta", str(beta), "a positive number")


def check_reference(reference: str, scores: str | None) -> None:
    """Stop with an ``InputError`` where it is not clear what the policy is measured against."""
    if reference not in ("online", "cache"):
        raise InputError("method.reference", repr(reference), "online or cache")
    if reference == "cache" and not scores:
        raise InputError("method.scores", "nothing", "the folder of a score cache, as method.reference is cache")


class DPO(PreferenceModel):
    """DPO on the policy's own tokens; every weight is 1.

    With ``reverse``, "chosen" in the names of metrics is the response that is preferred: the rejected one of the data.
    """

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference."""
        return self.run.method.beta

    def pair_ends(self, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """Swapped where ``reverse`` is set."""
        ends = super().pair_ends(microbatch)
        return ends[::-1] if self.run.method.reverse else ends

    def configure_model(self) -> None:
        """Build the policy, and its starting weights beside it where nothing is cached."""
        super().configure_model()
        if self.run.method.reference == "online" and not hasattr(self, "frozen"):
            self.frozen = FrozenModel(self.run_data.policy_path, self.run.parallel, self.run.precision)

    def prepare_step(self, batch: StepBatch) -> None:
        """Score the microbatches with the starting weights, where nothing is cached."""
        if self.run.method.reference == "online":
            for microbatch, reference_S in zip(batch.microbatches, self.frozen.score(batch.microbatches), strict=False):
                microbatch.reference_logprobs.copy_(reference_S)
