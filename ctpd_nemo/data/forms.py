"""One row of a preference file, in any of its forms, to a preference pair.

Four forms are read, and told apart by what the row holds:

- conversational: ``prompt`` is a list of messages, ``chosen`` and ``rejected`` go on from it;
- UltraFeedback-binarized: ``prompt`` is the text of a user turn, ``chosen`` and ``rejected`` are whole conversations;
- implicit prompt: no ``prompt``, ``chosen`` and ``rejected`` are whole conversations;
- plain: three strings.

``id`` (a string or a number) and ``system`` (a string) may stand beside them in every form. Other fields, of the row
and of a message, are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("id", "system", "prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two responses, of which people preferred one.

    Attributes:
        id: Names the pair in the score cache and in reports; unique in its dataset.
        prompt: An optional system message, then user and assistant turns; the last is the user's.
        chosen: Text of the preferred response.
        rejected: Text of the other response, never equal to ``chosen``.
        place: Where the pair was read, as ``file.jsonl:17``.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    place: str


class RowError(Exception):
    """A row that is no preference pair: a countable ``reason`` and what an ``InputError`` says about it."""

    def __init__(self, reason: str, found: str, expected: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.found = found
        self.expected = expected
        self.field = field


def parse_pair(row: Mapping[str, Any], default_id: str, place: str) -> PreferencePair:
    """The preference pair a row holds.

    Args:
        row: Field names to values.
        default_id: The pair's id where the row has none.
        place: Where the row was read.

    Raises:
        RowError: The row is no preference pair in any form.
    """
    chosen_context, chosen = _response(row, "chosen")
    rejected_context, rejected = _response(row, "rejected")
    if chosen_context != rejected_context:
        raise RowError(
            "prompt_mismatch", "other turns before the last one than `chosen` has", "one shared prompt", "rejected"
        )
    if chosen == rejected:
        raise RowError("equal_responses", "the text of `chosen`", "two different responses", "rejected")
    prompt = _system(row) + _prompt(row, chosen_context)
    _check_roles(prompt)
    return PreferencePair(_id(row, default_id), prompt, chosen, rejected, place)


def _response(row: Mapping[str, Any], field: str) -> tuple[tuple[Message, ...], str]:
    """The turns before the response, and the response's text."""
    value = _required(row, field)
    if isinstance(value, str):
        return (), _text(value, field)
    turns = _messages(value, field)
    if turns[-1].role != "assistant":
        raise RowError("last_turn_not_assistant", f"role {turns[-1].role!r} in the last turn", "'assistant'", field)
    return turns[:-1], turns[-1].content


def _prompt(row: Mapping[str, Any], context: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns before the response: ``prompt``, the conversations' own, or the first continued by the second."""
    continues = not context or context[0].role == "assistant"
    if row.get("prompt") is None and not continues:
        return context
    value = _required(row, "prompt")
    if isinstance(value, str):
        prompt: tuple[Message, ...] = (Message("user", _text(value, "prompt")),)
        agrees = any(turn.role == "user" and turn.content.strip() == value.strip() for turn in context)
    else:
        prompt = _messages(value, "prompt")
        agrees = context[: len(prompt)] == prompt
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
        raise RowError("wrong_type", _kind(value), "a string", "system")
    return (Message("system", _text(value, "system", may_be_blank=True)),)


def _id(row: Mapping[str, Any], default_id: str) -> str:
    value = row.get("id")
    if value is None:
        return default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("wrong_type", _kind(value), "a string or a whole number", "id")
    return _text(str(value), "id")


def _messages(value: Any, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise RowError("wrong_type", _kind(value), "a string or a list of messages", field)
    if not value:
        raise RowError("empty_field", "no messages", "at least one message", field)
    return tuple(_message(item, f"{field}[{number}]") for number, item in enumerate(value))


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str):
        found = _kind(item)
        if isinstance(item, dict):
            found = "an object with " + (
                ", ".join(f"{key!r}: {_kind(part)}" for key, part in item.items()) or "no fields"
            )
        raise RowError("wrong_type", found, "a message: an object with strings `role` and `content`", field)
    role = item["role"]
    if role not in ("system", "user", "assistant"):
        raise RowError("unknown_role", f"role {role!r}", "'system', 'user' or 'assistant'", field)
    # An empty system message is meant: it keeps a chat template from writing its own.
    return Message(role, _text(item["content"], field, may_be_blank=role == "system"))


def _check_roles(prompt: tuple[Message, ...]) -> None:
    """An optional system message, then user and assistant in turns, the user last."""
    roles = [message.role for message in prompt]
    turns = roles[1:] if roles[0] == "system" else roles
    if len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise RowError(
            "role_order",
            "roles " + ", ".join(roles),
            "an optional system message, then user and assistant in turns, the last turn before the response a user's",
            "prompt",
        )


def _required(row: Mapping[str, Any], field: str) -> Any:
    value = row.get(field)
    if value is None:
        raise RowError("missing_field", "null" if field in row else "no such field", "a value", field)
    return value


def _text(value: str, field: str, may_be_blank: bool = False) -> str:
    """The text itself, once it is known to hold something and to be writable as UTF-8."""
    if not may_be_blank and not value.strip():
        raise RowError("empty_field", "no text" if not value else "white space only", "text", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(value[error.start]):04X}"
        raise RowError(
            "lone_surrogate", f"the lone surrogate {surrogate} at character {error.start}", "Unicode text", field
        ) from None
    return value


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        type(None): "null",
        str: "a string",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
