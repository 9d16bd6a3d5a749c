"""The stages of the recipe, and what each builds on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.distillation import DistillationConfig


@dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    Attributes:
        name: Its key under ``stages`` in the config, and its folder.
        policy: Which model it trains; for scoring, whose spans.
        inputs: Config key -> the earlier stage whose output goes there.
        optional: The same of stages that may be left out; the key then has no value.
        cached: The same where its ``method.reference`` is "cache".
    """

    name: str
    policy: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    cached: Mapping[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> bool:
        """Whether it fills a cache; the others train."""
        return self.name.startswith("score")

    @property
    def output(self) -> str:
        """What it leaves in its folder: a score cache, or a Hugging Face folder."""
        return "cache" if self.scores else "export"

    def builds_on(self, config: DictConfig) -> dict[str, str]:
        """Its inputs in a run that leaves some stages out."""
        asked_for = {key: source for key, source in self.optional.items() if config.stages.get(source) is not None}
        cached = self.cached if OmegaConf.select(config, f"stages.{self.name}.method.reference") == "cache" else {}
        return {**self.inputs, **asked_for, **cached}


_SFT_TEACHER = {"model.teacher.path": "sft_teacher"}
_SFT_STUDENT = {"model.student.path": "sft_student"}
_SFT_BOTH = {**_SFT_STUDENT, **_SFT_TEACHER}
_SCORES = {"method.scores": "score"}
# CTPD, figure 1: fine-tune both, train the contrastive teacher pair, score, distil. The stages of the student's family
# are for other weightings and TIS-DPO.
STAGES = (
    Stage("sft_teacher", "teacher"),
    Stage("sft_student", "student"),
    Stage("dpo_positive", "teacher", _SFT_TEACHER),
    Stage("dpo_negative", "teacher", _SFT_TEACHER),
    Stage("dpo_student_positive", "student", _SFT_STUDENT),
    Stage("dpo_student_negative", "student", _SFT_STUDENT),
    Stage(
        "score",
        "student",
        {**_SFT_BOTH, "method.reference": "sft_teacher"},
        {"method.positive": "dpo_positive", "method.negative": "dpo_negative"},
    ),
    Stage(
        "score_student",
        "student",
        {**_SFT_BOTH, "method.student": "sft_student"},
        {"method.student_positive": "dpo_student_positive", "method.student_negative": "dpo_student_negative"},
    ),
    Stage("dpo_student", "student", _SFT_STUDENT),
    Stage(
        "tis_dpo",
        "student",
        {**_SFT_STUDENT, "method.positive": "dpo_student_positive", "method.negative": "dpo_student_negative"},
    ),
    # Distillation on chosen responses: the teacher is the fine-tuned one, beside the student or in the cache.
    Stage("uld", "student", _SFT_BOTH, cached=_SCORES),
    Stage("dskd", "student", _SFT_BOTH),
    Stage("multilevel_ot", "student", _SFT_BOTH, cached=_SCORES),
    Stage("ctpd", "student", {**_SFT_BOTH, **_SCORES}, {"method.student_scores": "score_student"}),
)
# The stages that give what a role of CTPD's weights or reference needs; margins are asked for in the config of "score".
_SOURCES = {
    "positive": ("score", "dpo_positive"),
    "negative": ("score", "dpo_negative"),
    "student": ("score_student", "sft_student"),
    "student_positive": ("score_student", "dpo_student_positive"),
    "student_negative": ("score_student", "dpo_student_negative"),
}


def check_roles(config: DictConfig, stage: Stage, method: CTPDConfig) -> None:
    """Stop where the weights or the reference of a stage need scores that no stage makes.

    Raises:
        InputError: Names the stage, or the value of one, that is missing.
    """
    if method.reference != "cache":
        return
    needed = method.roles()
    for role in (role for role in _SOURCES if role in needed):
        scoring, trained = _SOURCES[role]
        brought = OmegaConf.select(config, f"stages.{scoring}.method.{role}")
        for source in (scoring, *(() if brought else (trained,))):
            if config.stages.get(source) is None:
                expected = f"a stage: the weights or the reference of {stage.name} need scores of it ({role})"
                raise InputError(f"stages.{source}", "null", expected)
    if "margin" in needed and not OmegaConf.select(config, "stages.score.method.margin"):
        raise InputError("stages.score.method.margin", "false", f"true: the weights of {stage.name} are margins")


def check_top_k(config: DictConfig, stage: Stage, method: DistillationConfig) -> None:
    """Stop where a stage distils from a cache that does not have enough log-probs of each token.

    Raises:
        InputError: Names the value that is missing or too small.
    """
    if method.reference != "cache":
        return
    needed, kept = getattr(method, "top_k", None) or 1, OmegaConf.select(config, "stages.score.method.top_k")
    if kept is None or kept < needed:
        raise InputError("stages.score.method.top_k", str(kept), f"{needed} or more: {stage.name} reads them")
