"""Cross-Tokenizer Preference Distillation: the teacher's preferences, span by span."""

from dataclasses import dataclass

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.weighted import WeightedConfig, WeightedPreferenceModel
from ctpd_nemo.models.weighting import WEIGHTINGS, Weighting


@dataclass
class CTPDConfig(WeightedConfig):
    r"""CTPD (section 3; values of section 4.1; the weightings of table 2 and the reference of table 3).

    A weight is :math:`k \exp(\mu \, clamp(\rho, L, U))` of the log-ratio :math:`\rho` of its span, :math:`\mu` being +1
    in chosen and -1 in rejected responses, unless it says otherwise:

    - ``contrastive_teacher``: the teacher trained by DPO against the one trained on swapped pairs (section 3.4).
    - ``contrastive_student``: the same of a pair of the student's family, on the student's tokens of the span.
    - ``teacher_student``: the SFT teacher against the SFT student.
    - ``single_teacher``: the margin of the SFT teacher, the sum over its tokens of the span of
      :math:`\log p(y_t) - \max_{v \ne y_t} \log p(v)`; no pair is trained. Seen as a policy of maximum entropy over
      tokens, a model's log-probs are its values of tokens up to a constant of the position (Rafailov et al. 2024, "From
      r to Q*"), which the difference cancels: what is left is by how much the teacher values a token more than its own
      best other choice. That is the ratio of a contrastive pair whose other half is the teacher's second thought:
      chosen spans that it would write weigh more, and rejected spans that it would not.
    - ``average``: those of ``contrastive_teacher``, divided by the length of the span. The paper does not say in what;
      here it is the teacher's tokens, whose ratios the weight was summed of. The end of turn counts as it is encoded.
    - ``random``: U(-1, 1), without ``k``, clamp or sign.
    - ``uniform``: 1.
    - ``constant``: the mean of a response's weights by ``contrastive_teacher``, on all its spans.
    - ``shuffled``: the weights by ``contrastive_teacher`` on the spans of the same response in another order.

    The last two are controls: what they gain as well is not due to where the weight lies. What is drawn is a function
    of the run's seed, the pair's id and the response.

    Attributes:
        weights: How spans are weighed.
        reference_model: What the student is measured against on each span: "teacher", or "student" for what it was
            before it was trained, on its own tokens (table 3).
        student_positive: Folder of the student trained by DPO, where ``reference`` is "online".
        student_negative: Folder of the student trained on swapped pairs, likewise.
        student_scores: A second cache, for the roles that ``scores`` does not hold: scores of student models, whose
            job has another layout than the teachers'.
    """

    name: str = "ctpd"
    weights: str = "contrastive_teacher"
    reference_model: str = "teacher"
    student_positive: str | None = None
    student_negative: str | None = None
    student_scores: str | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together."""
        if self.weights not in WEIGHTINGS:
            raise InputError("method.weights", repr(self.weights), "one of " + ", ".join(WEIGHTINGS))
        if self.reference_model not in ("teacher", "student"):
            raise InputError("method.reference_model", repr(self.reference_model), "teacher or student")
        super().check()

    @property
    def reference_role(self) -> str:
        """The role of the model that the student is measured against."""
        return "reference" if self.reference_model == "teacher" else "student"

    def weighting(self, seed: int) -> Weighting:
        """How spans are weighed."""
        return Weighting(self.weights, self.weight_scale, self.weight_lower, self.weight_upper, seed)

    def folders(self, run: RunConfig) -> dict[str, str | None]:
        """The folder of each model: teacher and student are those of the run."""
        return {
            "reference": run.model.teacher.path,
            "positive": self.positive,
            "negative": self.negative,
            "student": run.policy_side().path,
            "student_positive": self.student_positive,
            "student_negative": self.student_negative,
        }


class CTPD(WeightedPreferenceModel):
    """The student against its teacher, on the spans that both tokenizations share."""
