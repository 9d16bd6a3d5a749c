"""What methods with span weights share: their config, and frozen models beside the policy where nothing is cached."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encoded_pair import SideName
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.dpo import check_beta, check_reference
from ctpd_nemo.models.preference import PreferenceModel
from ctpd_nemo.models.roles import ROLES, by_model, score_roles
from ctpd_nemo.models.teacher import FrozenModel
from ctpd_nemo.models.weighting import Spans, Weighting


@dataclass
class WeightedConfig(ABC):
    """What CTPD and TIS-DPO have in common.

    Attributes:
        beta: Strength of the pull to the reference.
        reference: "cache" reads ``scores``; "online" holds the frozen models beside the policy.
        scores: Span score cache with the roles that the method needs, where ``reference`` is "cache".
        scoring_precision: The precision those scores were computed in; ``None`` for that of this run.
        positive: Folder of the reference's family trained by DPO, where ``reference`` is "online".
        negative: The same trained on swapped pairs, likewise.
        weight_scale: ``k``.
        weight_lower: ``L``, in nats.
        weight_upper: ``U``, in nats.
    """

    name: str = ""
    beta: float = 0.1
    reference: str = "cache"
    scores: str | None = None
    scoring_precision: str | None = None
    positive: str | None = None
    negative: str | None = None
    weight_scale: float = 1.0
    weight_lower: float = -0.5
    weight_upper: float = 1.5

    @abstractmethod
    def weighting(self, seed: int) -> Weighting:
        """How spans are weighed; drawn numbers depend on the seed of the run."""

    @abstractmethod
    def folders(self, run: RunConfig) -> dict[str, str | None]:
        """The folder of each model that the method may need, by role; ``None`` where the run names none."""

    @property
    def reference_role(self) -> str:
        """The role of the model that the policy is measured against."""
        return "reference"

    def roles(self) -> tuple[str, ...]:
        """Whose scores the method needs, the reference first."""
        return tuple(dict.fromkeys((self.reference_role, *self.weighting(seed=0).roles)))

    def sides(self) -> set[SideName]:
        """Whose tokens those models read."""
        return {ROLES[role].side for role in self.roles()}

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        check_beta(self.beta)
        check_reference(self.reference, self.scores)
        if not 0 < self.weight_scale < math.inf:
            raise InputError("method.weight_scale", str(self.weight_scale), "a positive number")
        if not self.weight_lower <= self.weight_upper:
            found = f"{self.weight_lower} with weight_upper {self.weight_upper}"
            raise InputError("method.weight_lower", found, "lower <= upper")
        if self.reference == "online":
            for key in by_model(self.roles()):
                if key not in ("reference", "student") and not getattr(self, key):
                    raise InputError(f"method.{key}", "nothing", "a model folder, as method.reference is online")

    def online_folders(self, run: RunConfig) -> dict[str, str]:
        """The folder of each model to hold beside the policy, by role; none where scores are read from a cache.

        Raises:
            InputError: The run names only a tokenizer for one of them.
        """
        found: dict[str, str] = {}
        for name in by_model(self.roles()) if self.reference == "online" else ():
            folder = self.folders(run)[name]
            if folder is None:
                raise InputError("model.teacher.path", "nothing", "a model folder, as method.reference is online")
            found[name] = folder
        return found


class WeightedPreferenceModel(PreferenceModel):
    """A policy against a reference with a weight a span, from a cache or from frozen models beside it."""

    weighs_spans = True

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference."""
        return self.run.method.beta

    def configure_model(self) -> None:
        """Build the policy, and the frozen models beside it where nothing is cached."""
        super().configure_model()
        if not hasattr(self, "frozen"):
            self.frozen = {
                name: FrozenModel(folder, self.run.parallel, self.run.precision)
                for name, folder in self.run.method.online_folders(self.run).items()
            }

    def prepare_step(self, batch: StepBatch) -> None:
        """Score the same spans with the frozen models, each on its side's tokens, where nothing is cached."""
        if self.run.method.reference == "online":
            # Where nothing reads the reference's tokens, or these are the policy's own, there are none of its own.
            references = batch.reference_microbatches or batch.microbatches
            sides: dict[SideName, Sequence[Microbatch]] = {"policy": batch.microbatches, "reference": references}
            self._fill(sides, score_roles(self.frozen, self.run.method.roles(), sides))

    def _fill(self, sides: Mapping[SideName, Sequence[Microbatch]], scores: Mapping[str, Sequence[Tensor]]) -> None:
        """Write reference log-probs and weights into the microbatches; scores are there on the last stage only."""
        method = self.run.method
        weighting = method.weighting(self.run.seed)
        for index in range(len(scores[method.reference_role])):
            microbatch, reference = sides["policy"][index], sides["reference"][index]
            own = {role: parts[index] for role, parts in scores.items()}
            microbatch.reference_logprobs.copy_(own[method.reference_role])
            microbatch.span_weights.copy_(weighting.weights(own, Spans.of_microbatch(microbatch, reference)))
