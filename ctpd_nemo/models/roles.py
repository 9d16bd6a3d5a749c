"""The roles of frozen models: whose tokens each reads, and what is asked of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encoded_pair import SideName
from ctpd_nemo.models.forward import span_margins
from ctpd_nemo.models.teacher import FrozenModel


@dataclass(frozen=True)
class Role:
    """One set of scores, a number a span.

    Attributes:
        side: Whose tokens the model reads: the reference's (the teacher's), or the policy's (the student's). Spans are
            the same on both.
        margin_of: The role whose model gives these scores as margins; ``None`` for log-probs of a model of its own.
    """

    side: SideName
    margin_of: str | None = None


ROLES = {
    # The model that a policy is measured against: the SFT teacher, or what reads as the policy does.
    "reference": Role("reference"),
    # The contrastive pair of its family.
    "positive": Role("reference"),
    "negative": Role("reference"),
    "margin": Role("reference", margin_of="reference"),
    # The SFT student, and the contrastive pair of its family, on the student's own tokens of the shared spans.
    "student": Role("policy"),
    "student_positive": Role("policy"),
    "student_negative": Role("policy"),
}


def by_model(roles: Iterable[str]) -> dict[str, list[str]]:
    """The roles that each model plays, by the role that names its folder, in the order of ``ROLES``."""
    wanted = set(roles)
    models: dict[str, list[str]] = {}
    for name, role in ROLES.items():
        if name in wanted:
            models.setdefault(role.margin_of or name, []).append(name)
    return models


def score_roles(
    models: Mapping[str, FrozenModel],
    roles: Iterable[str],
    microbatches: Mapping[SideName, Sequence[Microbatch]],
) -> dict[str, list[Tensor]]:
    """Scores of every span in each role, one forward pass a model; every rank of the layout calls it together.

    Args:
        models: By the role that names the folder.
        roles: What is wanted of them.
        microbatches: Of each side that a role reads, pair by pair alike.

    Returns:
        For each role fp32 ``[num_spans]`` of each microbatch, on the last pipeline stage; elsewhere empty lists.
    """
    scores: dict[str, list[Tensor]] = {}
    for name, played in by_model(roles).items():
        read = microbatches[ROLES[name].side]
        if any(ROLES[role].margin_of for role in played):
            found = models[name].read(read, span_margins)
            both = {"logprob": [pair[0] for pair in found], "margin": [pair[1] for pair in found]}
            scores |= {role: both["margin" if ROLES[role].margin_of else "logprob"] for role in played}
        else:
            scores[name] = models[name].score(read)
    return scores
