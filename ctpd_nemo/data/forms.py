"""One row of a preference file, in any of its forms, to a preference pair.

Five forms are read, and told apart by what the row holds:

- conversational: ``prompt`` is a list of messages, ``chosen`` and ``rejected`` go on from it;
- UltraFeedback-binarized: ``prompt`` is the text of a user turn, ``chosen`` and ``rejected`` are whole conversations;
- implicit prompt: no ``prompt``, ``chosen`` and ``rejected`` are whole conversations;
- plain: three strings;
- NeMo-RL's: ``context`` is a list of messages, ``completions`` are two with a ``rank`` and a ``completion`` each, of
  which the lower rank is preferred.

``id`` (a string or a number) and ``system`` (a string) may stand beside them in every form. Fields of the row and of
its messages that carry meaning to a chat template are kept for it; others are not read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctpd_nemo.data.messages import (
    BASIC_ROLES,
    MEANT,
    MEANT_IN_MESSAGES,
    TOOL_ROLES,
    KeptFields,
    Message,
    RowError,
    calls_tools,
    kept_values,
    kind_of,
    read_messages,
    text_of,
)

__all__ = ["FIELDS", "KeptFields", "Message", "PreferencePair", "RowError", "parse_pair"]

FIELDS = ("id", "system", "prompt", "chosen", "rejected", "context", "completions")
# From what has been said and who speaks next, to what has been said then.
_FOLLOWS = {
    ("begin", "system"): "system",
    ("begin", "developer"): "developer",
    ("system", "developer"): "developer",
    **dict.fromkeys(((before, "user") for before in ("begin", "system", "developer", "assistant", "tool")), "user"),
    ("user", "assistant"): "assistant",
    ("calling", "tool"): "tool",
    ("tool", "tool"): "tool",
    ("tool", "assistant"): "assistant",
}


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two responses, of which people preferred one.

    Attributes:
        id: What the user calls the pair, for people; others may have the same.
        prompt: Optional instructions, then user and assistant turns; the last is the user's, or a tool's result.
        chosen: Text of the preferred response.
        rejected: Text of the other response.
        place: Where the pair was read, as ``file.jsonl:17``: no other pair has it.
        fields: Columns of the row that templates get as variables, by name.
        whole: "chosen" and "rejected", where the response is more than its text: the message.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    place: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    whole: Mapping[str, Message] = field(default_factory=dict, hash=False)

    @property
    def is_plain(self) -> bool:
        """Whether it is text alone, of roles that every template knows."""
        if self.fields or self.whole:
            return False
        return not any(message.extra or message.role not in BASIC_ROLES for message in self.prompt)

    def content(self) -> str:
        """All that it says, as JSON: prompt and responses, then what else it holds where it is not plain."""
        prompt = [(message.role, message.content) for message in self.prompt]
        parts: list[Any] = [prompt, self.chosen, self.rejected]
        if not self.is_plain:
            whole = {name: message.extra for name, message in self.whole.items()}
            silent = [message.no_content for message in (*self.prompt, *self.whole.values())]
            parts += [[message.extra for message in self.prompt], whole, self.fields, silent]
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def parse_pair(row: Mapping[str, Any], default_id: str, place: str, kept: KeptFields = MEANT) -> PreferencePair:
    """The preference pair a row holds.

    Args:
        row: Field names to values.
        default_id: The pair's id where the row has none.
        place: Where the row was read.
        kept: Which fields are kept for templates.

    Raises:
        RowError: The row is no preference pair in any form.
    """
    columns = {name: value for name, value in row.items() if name in kept.of_rows}
    fields = kept_values(columns, "") if columns else {}
    if row.get("completions") is not None and row.get("chosen") is None and row.get("rejected") is None:
        row = _ranked(row)
    chosen_context, chosen = _response(row, "chosen", kept)
    rejected_context, rejected = _response(row, "rejected", kept)
    if not _say_alike(chosen_context, rejected_context):
        raise RowError(
            "prompt_mismatch", "other turns before the last one than `chosen` has", "one shared prompt", "rejected"
        )
    if chosen.content == rejected.content and _say_alike([chosen], [rejected]):
        raise RowError("equal_responses", "the text of `chosen`", "two different responses", "rejected")
    prompt = _system(row) + _prompt(row, chosen_context, kept)
    _check_roles(prompt)
    whole = {name: message for name, message in (("chosen", chosen), ("rejected", rejected)) if message.extra}
    fields = dict(sorted(fields.items()))
    return PreferencePair(_id(row, default_id), prompt, chosen.content, rejected.content, place, fields, whole)


def _ranked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of NeMo-RL's form in the conversational one."""
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) != 2:
        found = f"{len(completions)} completions" if isinstance(completions, list) else kind_of(completions)
        raise RowError("wrong_type", found, "a list of two completions", "completions")
    ranks = []
    for number, completion in enumerate(completions):
        place = f"completions[{number}]"
        rank = completion.get("rank") if isinstance(completion, dict) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
            raise RowError("wrong_type", kind_of(rank if rank is not None else completion), "a number `rank`", place)
        ranks.append(rank)
    if ranks[0] == ranks[1]:
        raise RowError("equal_ranks", f"rank {ranks[0]} twice", "one completion that is preferred", "completions")
    chosen, rejected = sorted(completions, key=lambda completion: completion["rank"])
    own = {name: row[name] for name in row if name not in ("context", "completions")}
    prompt = row.get("context") if own.get("prompt") is None else own["prompt"]
    return {**own, "prompt": prompt, "chosen": chosen.get("completion"), "rejected": rejected.get("completion")}


def _response(row: Mapping[str, Any], field: str, kept: KeptFields) -> tuple[tuple[Message, ...], Message]:
    """The turns before the response, and the response."""
    value = _required(row, field)
    if isinstance(value, str):
        return (), Message("assistant", text_of(value, field))
    turns = read_messages(value, field, kept)
    if turns[-1].role != "assistant":
        raise RowError("last_turn_not_assistant", f"role {turns[-1].role!r} in the last turn", "'assistant'", field)
    return turns[:-1], turns[-1]


def _say_alike(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether two conversations mean the same, whatever ids and dates their messages carry."""
    if len(messages) != len(others):
        return False
    for one, other in zip(messages, others, strict=True):
        names = MEANT_IN_MESSAGES.intersection((*one.extra, *other.extra))
        if (one.role, one.content, one.no_content) != (other.role, other.content, other.no_content):
            return False
        if any(one.extra.get(name) != other.extra.get(name) for name in names):
            return False
    return True


def _prompt(row: Mapping[str, Any], context: tuple[Message, ...], kept: KeptFields) -> tuple[Message, ...]:
    """The turns before the response: ``prompt``, the conversations' own, or the first continued by the second."""
    continues = not context or context[0].role in ("assistant", *TOOL_ROLES)
    if row.get("prompt") in (None, "", []) and not continues:
        return context
    value = _required(row, "prompt")
    if isinstance(value, str):
        prompt: tuple[Message, ...] = (Message("user", text_of(value, "prompt")),)
        agrees = any(turn.role == "user" and turn.content.strip() == value.strip() for turn in context)
    else:
        prompt = read_messages(value, "prompt", kept)
        agrees = _say_alike(context[: len(prompt)], prompt)
    if continues:
        return prompt + context
    if not agrees:
        raise RowError(
            "prompt_mismatch",
            "a text that is not in the conversations",
            "the turns that `chosen` and `rejected` begin with, or no `prompt` beside whole conversations",
            "prompt",
        )
    return context


def _system(row: Mapping[str, Any]) -> tuple[Message, ...]:
    value = row.get("system")
    if value is None or value == "":
        return ()
    if not isinstance(value, str):
        raise RowError("wrong_type", kind_of(value), "a string", "system")
    return (Message("system", text_of(value, "system", may_be_blank=True)),)


def _id(row: Mapping[str, Any], default_id: str) -> str:
    """The label of the row; a column of numbers in which some are missing may hold NaN for these."""
    value = row.get("id")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return default_id
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("wrong_type", kind_of(value), "a string or a number", "id")
    return text_of(str(value), "id")


def _check_roles(prompt: tuple[Message, ...]) -> None:
    """Optional instructions, then user and assistant in turns, the user last; tools where an assistant calls them."""
    state = "begin"
    for message in prompt:
        role = "tool" if message.role in TOOL_ROLES else message.role
        state = _FOLLOWS.get((state, role), "")
        if state == "assistant" and calls_tools(message):
            state = "calling"
    if state not in ("user", "tool"):
        raise RowError(
            "role_order",
            "roles " + ", ".join(message.role for message in prompt),
            "an optional system message, then user and assistant in turns, the last turn before the response a user's, "
            "or a tool's where the assistant has called it",
            "prompt",
        )


def _required(row: Mapping[str, Any], field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise RowError("missing_field", "null" if field in row else "no such field", "a value", field)
    return value
