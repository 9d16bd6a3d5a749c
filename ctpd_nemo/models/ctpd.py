"""Cross-Tokenizer Preference Distillation: the teacher's preferences, span by span."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.preference import span_weights
from ctpd_nemo.models.dpo import check_beta, check_reference
from ctpd_nemo.models.preference import PreferenceModel
from ctpd_nemo.models.teacher import FrozenModel


@dataclass
class CTPDConfig:
    """CTPD (section 3; values of section 4.1).

    Attributes:
        beta: Strength of the pull to the teacher.
        reference: "cache" reads ``scores``; "online" holds the teachers beside the student.
        scores: Span score cache with the roles reference, positive and negative, where ``reference`` is "cache".
        scoring_precision: The precision those scores were computed in; ``None`` for that of this run.
        positive: Folder of the teacher trained by DPO, where ``reference`` is "online".
        negative: Folder of the teacher trained on swapped pairs, likewise.
        weights: "contrastive_teacher" (section 3.4), or "uniform": every weight is 1.
        weight_scale: ``k``.
        weight_lower: ``L``, in nats.
        weight_upper: ``U``, in nats.
    """

    name: str = "ctpd"
    beta: float = 0.1
    reference: str = "cache"
    scores: str | None = None
    scoring_precision: str | None = None
    positive: str | None = None
    negative: str | None = None
    weights: str = "contrastive_teacher"
    weight_scale: float = 1.0
    weight_lower: float = -0.5
    weight_upper: float = 1.5

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        check_beta(self.beta)
        check_reference(self.reference, self.scores)
        if self.weights not in ("contrastive_teacher", "uniform"):
            raise InputError("method.weights", repr(self.weights), "contrastive_teacher or uniform")
        if not 0 < self.weight_scale < math.inf:
            raise InputError("method.weight_scale", str(self.weight_scale), "a positive number")
        if not self.weight_lower <= self.weight_upper:
            found = f"{self.weight_lower} with weight_upper {self.weight_upper}"
            raise InputError("method.weight_lower", found, "lower <= upper")
        if self.reference == "online" and self.weights == "contrastive_teacher":
            for key in ("positive", "negative"):
                if not getattr(self, key):
                    raise InputError(f"method.{key}", "nothing", "a model folder, as method.reference is online")

    def roles(self) -> tuple[str, ...]:
        """The models whose scores the method needs."""
        return ("reference", "positive", "negative") if self.weights == "contrastive_teacher" else ("reference",)

    def span_weights(self, positive_S: Tensor, negative_S: Tensor, sign: float | Tensor) -> Tensor:
        """Importance weights of spans; ``sign`` is +1 for chosen and -1 for rejected responses."""
        return span_weights(positive_S, negative_S, sign, self.weight_scale, self.weight_lower, self.weight_upper)


class CTPD(PreferenceModel):
    """The student against its teacher, on the spans that both tokenizations share."""

    weighs_spans = True

    @property
    def beta(self) -> float:
        """Strength of the pull to the teacher."""
        return self.run.method.beta

    def configure_model(self) -> None:
        """Build the student, and its teachers beside it where nothing is cached."""
        super().configure_model()
        method = self.run.method
        if method.reference == "online" and not hasattr(self, "teachers"):
            folders = {
                "reference": self.run.model.teacher.path,
                "positive": method.positive,
                "negative": method.negative,
            }
            self.teachers = {
                role: FrozenModel(folders[role], self.run.parallel, self.run.precision) for role in method.roles()
            }

    def prepare_step(self, batch: StepBatch) -> None:
        """Score the teachers' tokens of the same spans, where nothing is cached."""
        if self.run.method.reference == "online":
            scores = {role: model.score(batch.reference_microbatches) for role, model in self.teachers.items()}
            self._fill_scores(batch.microbatches, scores)

    def _fill_scores(self, microbatches: Sequence[Microbatch], scores: dict[str, list[Tensor]]) -> None:
        """Write reference log-probs and weights into the microbatches; scores are there on the last stage only."""
        for index, microbatch in enumerate(microbatches[: len(scores["reference"])]):
            microbatch.reference_logprobs.copy_(scores["reference"][index])
            if "positive" in scores:
                sign_R = torch.ones(microbatch.num_responses, device=scores["positive"][index].device)
                sign_R[microbatch.rejected.long()] = -1.0
                microbatch.span_weights.copy_(
                    self.run.method.span_weights(
                        scores["positive"][index],
                        scores["negative"][index],
                        sign_R[microbatch.span_response.long()],
                    )
                )
