"""Messages of a conversation as rows hold them: role, text, and what else a chat template may render."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Roles that every chat template is taken to know; one that knows others names them.
BASIC_ROLES = ("system", "user", "assistant")
INSTRUCTION_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function", "ipython")
# One and the same thing, by the names that serving engines and templates give it.
REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# What a reader who does not see it misunderstands: it is rendered, or the row is not used.
MEANT_IN_ROWS = frozenset({"tools", "functions", "documents", *MEDIA})
MEANT_IN_MESSAGES = frozenset({"name", "refusal", *CALLS, *REASONING, *MEDIA})
_TEXT_ALONE = {"role", "content"}
# Lists and objects in each other, of a field that is kept.
_DEEPEST = 64
# Lists of objects to templates, and often text in files, whose columns have one type.
_LISTS = ("tools", "documents", "tool_calls")


class RowError(Exception):
    """A row that is no preference pair: a countable ``reason`` and what an ``InputError`` says about it."""

    def __init__(self, reason: str, found: str, expected: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.found = found
        self.expected = expected
        self.field = field


@dataclass(frozen=True)
class KeptFields:
    """Which fields are kept beside those that are read: what carries meaning, and what a template names.

    Attributes:
        of_rows: Names of columns; templates get them as variables.
        of_messages: Names of fields of a message.
        everything: Whether all fields of messages are kept: a template writes them without naming them.
    """

    of_rows: frozenset[str] = MEANT_IN_ROWS
    of_messages: frozenset[str] = MEANT_IN_MESSAGES | {"tool_call_id"}
    everything: bool = False

    def __or__(self, other: "KeptFields") -> "KeptFields":
        return KeptFields(
            self.of_rows | other.of_rows, self.of_messages | other.of_messages, self.everything or other.everything
        )


MEANT = KeptFields()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant"; "developer" and the roles of tools where the template knows them.
        content: Its text.
        extra: What else it holds that a template may render, by field; never null, never empty.
        no_content: Whether it has no text at all, only calls.
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    no_content: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The message as templates know it."""
        content = {} if self.no_content else {"content": self.content}
        return {"role": self.role, **content, **self.extra}

    def texts(self) -> list[str]:
        """All strings that it holds but its role."""
        return [self.content, *texts_in(self.extra)]

    def with_texts(self, change: Callable[[str], str]) -> "Message":
        """The same with each of these strings changed."""
        return Message(self.role, change(self.content), changed_texts(self.extra, change), self.no_content)


def texts_in(value: Any) -> list[str]:
    """All strings in a value as of JSON, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for part in item for text in texts_in(part)]
    return [text for part in value for text in texts_in(part)] if isinstance(value, list) else []


def changed_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value as of JSON with each string in it changed; names of fields at the top stay."""
    if isinstance(value, Mapping):
        return {name: _changed(part, change) for name, part in value.items()}
    return _changed(value, change)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(name, change): _changed(part, change) for name, part in value.items()}
    return [_changed(part, change) for part in value] if isinstance(value, list) else value


def read_messages(value: Any, field: str, kept: KeptFields) -> tuple[Message, ...]:
    """The messages of a list, or of one message that stands for a list; those that are null are passed over.

    Raises:
        RowError: There is none, or one is no message.
    """
    if isinstance(value, dict) and "role" in value:
        return (_message(value, field, kept),)
    if not isinstance(value, list):
        raise RowError("wrong_type", kind_of(value), "a string or a list of messages, or one message", field)
    messages: list[Message] = []
    for number, item in enumerate(value):
        if not _is_null(item):
            messages.append(_message(item, f"{field}[{number}]", kept))
            _check_tool(messages, f"{field}[{number}]")
    if not messages:
        raise RowError("empty_field", "no messages", "at least one message", field)
    return tuple(messages)


def _is_null(item: Any) -> bool:
    """What fills a list up to the length of another, and a system message that is null, not empty."""
    if not isinstance(item, dict):
        return item is None
    if item.get("role") and item.get("content"):
        return False
    said = {name: value for name, value in item.items() if value not in (None, "")}
    return ("role" in item and not said) or (said == {"role": "system"} and item.get("content", "") is None)


def _message(item: Any, field: str, kept: KeptFields) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise _no_message(item, field)
    role, value = item["role"], item.get("content")
    if role not in (*BASIC_ROLES, *INSTRUCTION_ROLES, *TOOL_ROLES):
        raise _unknown_role(role, field)
    extra = {} if item.keys() == _TEXT_ALONE else _extra(item, field, kept)
    calls = role == "assistant" and any(name in extra for name in CALLS)
    if value is None and calls:
        return Message(role, "", extra, no_content=True)
    if isinstance(value, list):
        value = _text_of_parts(value, field)
    if not isinstance(value, str):
        raise _no_message(item, field)
    # An empty system message is meant: it keeps a chat template from writing its own. A tool may have nothing to say.
    may_be_blank = calls or role in (*INSTRUCTION_ROLES, *TOOL_ROLES)
    return Message(role, text_of(value, field, may_be_blank), extra)


def _extra(item: Mapping[str, Any], field: str, kept: KeptFields) -> dict[str, Any]:
    names = item if kept.everything else kept.of_messages
    return kept_values({name: item[name] for name in item if name in names and name not in ("role", "content")}, field)


def _check_tool(messages: list[Message], field: str) -> None:
    """A tool speaks when an assistant has called it, in this field or where the turns before it stand."""
    role = messages[-1].role
    if role in TOOL_ROLES and len(messages) > 1 and not (calls_tools(messages[-2]) or messages[-2].role in TOOL_ROLES):
        raise _unknown_role(role, field)


def calls_tools(message: Message) -> bool:
    """Whether a message calls a tool."""
    return message.role == "assistant" and any(name in message.extra for name in CALLS)


def _unknown_role(role: str, field: str) -> RowError:
    expected = "'system', 'user' or 'assistant', 'developer', or a tool's where an assistant has called it"
    return RowError("unknown_role", f"role {role!r}", expected, field)


def _no_message(item: Any, field: str) -> RowError:
    found = kind_of(item)
    if isinstance(item, dict):
        found = "an object with " + (
            ", ".join(f"{key!r}: {kind_of(part)}" for key, part in item.items()) or "no fields"
        )
    return RowError("wrong_type", found, "a message: an object with strings `role` and `content`", field)


def _text_of_parts(parts: list[Any], field: str) -> str:
    """The text of ``[{"type": "text", "text": ...}, ...]``, end to end, as templates write parts."""
    texts = []
    for number, part in enumerate(parts):
        if part is None:
            continue
        place = f"{field}.content[{number}]"
        said = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if said.keys() - {"cache_control"} != {"type", "text"} or said["type"] != "text":
            found = f"a part of type {said['type']!r}" if "type" in said else kind_of(part)
            if said.get("type") == "text":
                found = "a part of text with " + (", ".join(sorted(said.keys() - {"type"})) or "no text")
            raise RowError("unread_part", found, "parts of type 'text', with a string `text`", place)
        if not isinstance(said["text"], str):
            raise RowError("wrong_type", kind_of(said["text"]), "a string `text`", place)
        texts.append(said["text"])
    return "".join(texts)


def kept_values(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The fields that say something, each known to be what JSON can hold.

    Raises:
        RowError: One is of a type that no template can read, or holds half a character.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        place = f"{field}.{name}".removeprefix(".")
        if name in _LISTS:
            value = _list_of_objects(value, place)
            if not value:
                continue
        if _is_deep(value):
            raise RowError("wrong_type", f"more than {_DEEPEST} lists or objects in each other", "fewer", place)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RowError("lone_surrogate", "a lone surrogate", "Unicode text", place) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError("wrong_type", f"a value that is no JSON ({error})", "JSON", place) from None
        kept[name] = value
    return kept


def _is_deep(value: Any, left: int = _DEEPEST) -> bool:
    """Whether lists and objects stand in each other beyond what is read."""
    if not isinstance(value, list | dict):
        return False
    return left == 0 or any(_is_deep(part, left - 1) for part in (value.values() if isinstance(value, dict) else value))


def _list_of_objects(value: Any, field: str) -> list[Any]:
    """A list of objects, from one, from one object, or from either as text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        items = [json.loads(item) if isinstance(item, str) else item for item in _as_list(value)]
    except (ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"text that is no JSON ({error})", "a list of objects", field) from None
    items = [item for item in items if item is not None]
    if not all(isinstance(item, dict) for item in items):
        raise RowError("wrong_type", kind_of(value), "a list of objects", field)
    return items


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def text_of(value: str, field: str, may_be_blank: bool = False) -> str:
    """The text itself, once it is known to hold something and to be writable as UTF-8.

    Raises:
        RowError: It is blank where it may not be, or holds half a character.
    """
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


def kind_of(value: Any) -> str:
    """What a value is, for people."""
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
