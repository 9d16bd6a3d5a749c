"""TIS-DPO: DPO with an importance weight a token, from a contrastive pair of the policy's own family."""

from dataclasses import dataclass

from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.weighted import WeightedConfig, WeightedPreferenceModel
from ctpd_nemo.models.weighting import Weighting


@dataclass
class TISDPOConfig(WeightedConfig):
    r"""TIS-DPO (Liu et al. 2025), as the CTPD paper has it (section 2): without the sequence KL term.

    The weight of a token is :math:`k \exp(\mu \, clamp(\log\pi^+(y_t) - \log\pi^-(y_t), L, U))`, :math:`\mu` being +1
    in chosen and -1 in rejected responses; ``positive`` is the policy trained by DPO and ``negative`` the one trained
    on swapped pairs. The reference is what the policy was before it was trained. A cache is one of ``spans: own``.
    """

    name: str = "tis_dpo"
    reference: str = "online"

    def weighting(self, seed: int) -> Weighting:
        """How tokens are weighed."""
        return Weighting("contrastive_teacher", self.weight_scale, self.weight_lower, self.weight_upper, seed)

    def folders(self, run: RunConfig) -> dict[str, str | None]:
        """The folder of each model: the reference is what the policy begins with."""
        return {"reference": run.policy_side().path, "positive": self.positive, "negative": self.negative}


class TISDPO(WeightedPreferenceModel):
    """The policy against its own beginning; its own tokens are the spans, one that covers no text with the next."""
