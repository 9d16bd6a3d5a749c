"""Preference pairs in tokens, and pairs that are left out."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.turns import REASONING, WHITE_SPACE

SideName = Literal["policy", "reference"]
Responses = tuple[Literal["chosen"]] | tuple[Literal["chosen"], Literal["rejected"]]

# Of which side's template, and in what, a response that is trained as it is written is not as that template writes it.
DIFFERENCES = tuple(f"{side}_{what}" for side in ("policy", "reference") for what in (WHITE_SPACE, REASONING))


@dataclass(frozen=True, slots=True)
class SideTokens:
    """One side's tokens of a prompt and a response.

    Attributes:
        prompt_ids: int32 ``[n_prompt]``, at least one.
        response_ids: int32 ``[n_response]``, the end of turn included where the response has one.
        response_span: int32 ``[n_response]``, the span of each response token, ascending from 0.
    """

    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    response_span: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """A prompt and a response as both sides read them.

    Attributes:
        policy: Tokens of the policy.
        reference: Tokens of the reference; the very same object where the two read alike.
        bounds: int64, byte bounds in the response's text of the spans kept, the first 0; the end of turn has none.
        n_spans: Spans of the response; the end of turn is the last of them where there is one.
        truncated: Whether the response's end was cut off to fit; such a response has no end of turn.
        differences: Those of ``DIFFERENCES`` that it has.
    """

    policy: SideTokens
    reference: SideTokens
    bounds: NDArray[np.int64]
    n_spans: int
    truncated: bool
    differences: tuple[str, ...] = ()

    def side(self, name: SideName) -> SideTokens:
        """The tokens of one side."""
        return self.policy if name == "policy" else self.reference


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference pair in tokens; ``index`` is its row in the dataset."""

    index: int
    id: str
    chosen: EncodedResponse
    rejected: EncodedResponse

    def responses(self, names: Responses) -> list[EncodedResponse]:
        """Both responses, or the chosen one alone."""
        return [self.chosen if name == "chosen" else self.rejected for name in names]


# Faults of a row: with ``on_bad`` "stop" they stop a run.
FAULTS = ("refused_by_template", "rewritten_by_template", "unread_field", "unknown_role", "refused_by_tokenizer")
# Files name a reason by its place here.
SKIP_REASONS = ("prompt_too_long", "too_long", "equal_after_truncation", "equal_tokens", *FAULTS)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A pair that cannot be trained on, and which of ``SKIP_REASONS`` it is.

    ``prompt_too_long`` and ``too_long``: the prompt is over its own limit, or leaves no room for a span of a response.
    ``equal_after_truncation`` and ``equal_tokens``: nothing is left that tells chosen from rejected.
    ``refused_by_template`` and ``rewritten_by_template``: a template fails on the pair, or does not write its response
    as a turn of its own. ``unread_field`` and ``unknown_role``: it leaves out what carries meaning.
    ``refused_by_tokenizer``: a tokenizer gives up on its text.

    Attributes:
        index: Its number in the dataset.
        id: What the user calls it.
        reason: Why.
        why: The same in a line for people; empty where the reason says all.
    """

    index: int
    id: str
    reason: str
    why: str = field(default="", compare=False)
