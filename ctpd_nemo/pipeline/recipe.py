"""The stages of the recipe, their variants, and what each builds on.

A stage that is named like another with a hyphen behind it, ``ctpd-random``, is a variant: it has that one's values
where it has none of its own, and a folder of its own. Under ``inputs`` it says what it builds on, where that differs:
null for nothing, as with the path of a model that no stage has trained.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

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
    def base(self) -> str:
        """The stage of the recipe that it is, or is a variant of."""
        return self.name.partition("-")[0]

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
        cached = self.cached if stage_values(config, self).get("method", {}).get("reference") == "cache" else {}
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
_VARIANT = re.compile(r"[a-z0-9_]+(-[a-z0-9_]+)?")
# The stages that give what a role of CTPD's weights or reference needs; margins are asked for in the config of "score".
_SOURCES = {
    "positive": ("score", "dpo_positive"),
    "negative": ("score", "dpo_negative"),
    "student": ("score_student", "sft_student"),
    "student_positive": ("score_student", "dpo_student_positive"),
    "student_negative": ("score_student", "dpo_student_negative"),
}


def find_stages(config: DictConfig) -> list[Stage]:
    """The stages of a run that are not null, in their order: a variant comes behind what it is a variant of.

    Raises:
        InputError: A stage is not known, or what is said of one cannot be used.
    """
    known = ", ".join(stage.name for stage in STAGES)
    if not isinstance(config.stages, DictConfig):
        raise InputError("stages", repr(config.stages), "stages and their values")
    if config.get("only") is not None and not isinstance(config.only, ListConfig):
        raise InputError("only", repr(config.only), "a list of stages, [sft_teacher,score], or null")
    bases = {stage.name for stage in STAGES}
    for name in map(str, config.stages):
        own = config.stages[name]
        if name.partition("-")[0] not in bases or not _VARIANT.fullmatch(name):
            raise InputError(f"stages.{name}", "a stage that is not known", f"one of {known}, or one with -name behind")
        if own is not None and not isinstance(own, DictConfig):
            raise InputError(f"stages.{name}", repr(own), "values of the stage, or null")
    found: list[Stage] = []
    for base in STAGES:
        for name in map(str, config.stages):
            if name.partition("-")[0] == base.name and config.stages[name] is not None:
                found.append(_stage(config, replace(base, name=name), found))
    return found


def _stage(config: DictConfig, stage: Stage, before: list[Stage]) -> Stage:
    """A stage with the inputs that its values name, which are those of stages before it."""
    inputs, usual = _values(config, stage).get("inputs") or {}, {**stage.inputs, **stage.optional, **stage.cached}
    for key, source in inputs.items():
        place = f"stages.{stage.name}.inputs, {key}"
        if key not in usual:
            raise InputError(place, "no input of this stage", ", ".join(usual) or "none")
        if source is not None and source not in [one.name for one in before]:
            raise InputError(place, repr(source), "a stage that is not null and comes before this one")

    def linked(some: Mapping[str, str]) -> dict[str, str]:
        named = {key: inputs.get(key, source) for key, source in some.items()}
        return {key: source for key, source in named.items() if source is not None}

    return replace(stage, inputs=linked(stage.inputs), optional=linked(stage.optional), cached=linked(stage.cached))


def _values(config: DictConfig, stage: Stage) -> dict[str, Any]:
    said = [
        config.stages[name] for name in dict.fromkeys((stage.base, stage.name)) if config.stages.get(name) is not None
    ]
    values = OmegaConf.to_container(OmegaConf.merge({}, *(OmegaConf.to_container(own, resolve=True) for own in said)))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def stage_values(config: DictConfig, stage: Stage) -> dict[str, Any]:
    """What is said of one stage, over what is said of all: a variant's values over those it is a variant of."""
    return {key: value for key, value in _values(config, stage).items() if key != "inputs"}


def needed_stages(config: DictConfig, wanted: list[str]) -> list[str]:
    """Some stages and all that they build on, in the order of the recipe.

    Raises:
        InputError: One is null or not known.
    """
    stages = {stage.name: stage for stage in find_stages(config)}
    found: set[str] = set()
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name not in stages:
            raise InputError(f"stages.{name}", "null", "a stage that is built on, or asked for")
        if name not in found:
            found.add(name)
            todo += stages[name].builds_on(config).values()
    return [name for name in stages if name in found]


def check_roles(config: DictConfig, stage: Stage, method: CTPDConfig) -> None:
    """Stop where the weights or the reference of a stage need scores that no stage makes.

    Raises:
        InputError: Names the stage, or the value of one, that is missing.
    """
    if method.reference != "cache":
        return
    stages = {one.name: one for one in find_stages(config)}
    sources = stage.builds_on(config)
    caches = [stages[name] for key, name in sources.items() if key.endswith("scores") and name in stages]
    # A stage gives what another one trains, or what the run brings itself.
    scored = {key.removeprefix("method.") for cache in caches for key in cache.builds_on(config)}
    scored |= {key for cache in caches for key, value in stage_values(config, cache)["method"].items() if value}
    needed = method.roles()
    for role in (role for role in _SOURCES if role in needed and role not in scored):
        missing = [source for source in _SOURCES[role] if source not in stages]
        place = f"stages.{missing[0]}" if missing else f"stages.{stage.name}.inputs"
        found = "null" if missing else f"no stage that scores {role}"
        raise InputError(
            place, found, f"a stage: the weights or the reference of {stage.name} need scores of it ({role})"
        )
    if "margin" in needed and "margin" not in scored:
        raise InputError("stages.score.method.margin", "false", f"true: the weights of {stage.name} are margins")


def check_spans(config: DictConfig, stage: Stage) -> None:
    """Stop where a stage reads scores of other spans than its own: found when it begins, that costs what came before.

    Raises:
        InputError: Names the value that differs.
    """
    stages = {one.name: one for one in find_stages(config)}
    own = _spans_of(config, stage)
    for key, source in stage.builds_on(config).items():
        if not key.endswith("scores") or source not in stages:
            continue
        for name, value in _spans_of(config, stages[source]).items():
            if own[name] != value:
                expected = f"{value}, as in stages.{source}: scores are of the spans that are trained"
                raise InputError(f"stages.{stage.name}.data.{name}", str(own[name]), expected)


def _spans_of(config: DictConfig, stage: Stage) -> dict[str, Any]:
    """What a stage says of how responses are cut into spans."""
    data = {**config.data, **(stage_values(config, stage).get("data") or {})}
    return {name: data.get(name) for name in ("include_eos", "response_text", "max_length", "max_prompt_length")}


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
