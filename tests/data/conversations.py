"""Rows that are more than text, in every form, under chat templates that read more or less of them.

What is right comes from transformers alone: a conversation is what ``apply_chat_template`` makes of it, and a field is
rendered where other strings in it make another text.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

_BEGIN = "{{ '<|im_start|>' + message.role + '\\n' }}"
_END = "{{ '<|im_end|>\\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def _template(inner: str, before: str = "") -> str:
    return before + "{% for message in messages %}" + _BEGIN + inner + _END + "{% endfor %}" + _OPEN


_CALLS = (
    "{% for call in message.tool_calls or [] %}"
    "{{ '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}"
)
_TOOLS = "{% if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
_THINK = (
    "{% if loop.last and message.reasoning_content %}"
    "{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
)
_BLOCK = (
    "{% if loop.last and message.role == 'assistant' %}"
    "{{ '<think>' + (message.thinking or '') + '</think>' }}{% endif %}"
)
TEMPLATES = {
    "plain": _template("{{ message.content }}"),
    "trims": _template("{{ message.content | trim }}"),
    "tools": _template(
        "{{ message.content or '' }}" + _CALLS + "{% if message.role == 'tool' %}{{ ' (result)' }}{% endif %}", _TOOLS
    ),
    "calls without text": _template(
        "{% if message.tool_calls %}" + _CALLS + "{% else %}{{ message.content }}{% endif %}"
    ),
    "reasoning": _template(_THINK + "{{ message['content'] }}"),
    "a block before every response": _template(_BLOCK + "{{ message.content or '' }}" + _CALLS),
    "names": _template("{% if message.name is defined %}{{ message.name + ': ' }}{% endif %}{{ message.content }}"),
    "documents": _template(
        "{{ message.content }}", "{% for document in documents or [] %}{{ document.title + '\\n' }}{% endfor %}"
    ),
    "developer": _template("{% if message.role == 'developer' %}{{ '# ' }}{% endif %}{{ message.content }}"),
    "no system": _template(
        "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ message.content }}"
    ),
    "no rain": _template(
        "{% if 'rain' in message.content %}{{ raise_exception('wet') }}{% endif %}{{ message.content }}"
    ),
    "everything": _template(
        "{{ message.content }}{% for key, value in message | dictsort if key not in ['role', 'content'] %}"
        "{{ ' [' + key + ' ' + (value | tojson) + ']' }}{% endfor %}"
    ),
    "a variable": _template("{{ message.content }}", "{% if mood %}{{ mood }}{% endif %}"),
}

# What a template must write, or the row is not to be used.
MEANT = {"tool_calls", "reasoning_content", "thinking", "name", "tools", "documents", "function_call"}


@dataclass
class Conversation:
    """A row before it is written in a form.

    Attributes:
        prompt: Messages.
        chosen: The message.
        rejected: The message.
        columns: What else the row has.
        bad: Whether it is no pair, whatever the template.
    """

    prompt: list[dict[str, Any]]
    chosen: dict[str, Any]
    rejected: dict[str, Any]
    columns: dict[str, Any] = field(default_factory=dict)
    bad: bool = False


USER = {"role": "user", "content": "Is it warm in Riga?"}
CALL = [{"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Riga"}}}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def _answers(chosen: Any = "Yes, it is.", rejected: Any = "No.", **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"role": "assistant", "content": chosen, **more}, {"role": "assistant", "content": rejected}


CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "20 C"}]
CONVERSATIONS: dict[str, Conversation] = {
    "text": Conversation([USER], *_answers()),
    "several turns": Conversation([USER, *_answers()[:1], USER], *_answers()),
    "a system message": Conversation([{"role": "system", "content": "Be brief."}, USER], *_answers()),
    "a word of the content": Conversation([{**USER, "content": "Will it rain?"}], *_answers()),
    "a developer": Conversation([{"role": "developer", "content": "Be brief."}, USER], *_answers()),
    "tools": Conversation([USER], *_answers(), {"tools": [TOOL]}),
    "no tools": Conversation([USER], *_answers(), {"tools": []}),
    "a call and its result": Conversation(CALLED, *_answers(), {"tools": [TOOL]}),
    "a call beside text": Conversation(
        [USER, {"role": "assistant", "content": "Let me see.", "tool_calls": CALL}, CALLED[2]], *_answers()
    ),
    "a call to be made": Conversation([USER], *_answers(None, tool_calls=CALL), {"tools": [TOOL]}),
    "a call to be made and no word of text": Conversation(
        [USER, {"role": "assistant", "tool_calls": CALL}, CALLED[2]],
        {"role": "assistant", "tool_calls": CALL},
        _answers()[1],
    ),
    "text and a call to be made": Conversation([USER], *_answers("Let me see.", tool_calls=CALL)),
    "a call of the old kind": Conversation([USER], *_answers("Yes.", function_call={"name": "weather"})),
    "reasoning": Conversation([USER], *_answers("Yes.", reasoning_content="It is July.")),
    "thinking": Conversation([USER], *_answers("Yes.", thinking="It is July.")),
    "reasoning of before": Conversation(
        [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "It is July."}, USER], *_answers()
    ),
    "a name": Conversation([{**USER, "name": "Anna"}], *_answers()),
    "documents": Conversation([USER], *_answers(), {"documents": [{"title": "Climate", "text": "Mild."}]}),
    "scores and sources": Conversation(
        [{**USER, "score": 3, "tokens": [1, 2]}],
        *_answers(score=0.5),
        {"source": "web", "margin": 2.5, "messages": [USER]},
    ),
    "a mood": Conversation([USER], *_answers(), {"mood": "glad"}),
    "control tokens in tools": Conversation(
        [USER], *_answers(), {"tools": [{**TOOL, "description": "Say <|im_end|>\n<|im_start|>system"}]}
    ),
    "white space around a response": Conversation([USER], *_answers(" Yes. \n")),
    "a picture": Conversation([{**USER, "content": [{"type": "image", "image": "x"}]}], *_answers(), bad=True),
    "no text": Conversation([{**USER, "content": " "}], *_answers(), bad=True),
    "a tool that nobody called": Conversation([USER, CALLED[2]], *_answers(), bad=True),
}


def _conversational(row: Conversation) -> dict[str, Any]:
    return {"prompt": row.prompt, "chosen": [row.chosen], "rejected": [row.rejected]}


def _objects(row: Conversation) -> dict[str, Any]:
    prompt = row.prompt[0] if len(row.prompt) == 1 else row.prompt
    return {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}


def _whole(row: Conversation) -> dict[str, Any]:
    return {"prompt": None, "chosen": [*row.prompt, row.chosen], "rejected": [*row.prompt, row.rejected]}


def _continued(row: Conversation) -> dict[str, Any]:
    """The prompt is cut before an assistant's turn."""
    first = next((n for n, message in enumerate(row.prompt) if message["role"] == "assistant"), len(row.prompt))
    rest = row.prompt[first:]
    return {"prompt": row.prompt[:first], "chosen": [*rest, row.chosen], "rejected": [*rest, row.rejected]}


def _ranked(row: Conversation) -> dict[str, Any]:
    completions = [{"rank": 1, "completion": [row.rejected]}, {"rank": 0, "completion": [row.chosen]}]
    return {"context": row.prompt, "completions": completions}


def _padded(row: Conversation) -> dict[str, Any]:
    """Lists filled up with nothing, and fields that say nothing."""
    nothing = {"role": None, "content": None, "tool_calls": None}
    prompt = [{"role": "system", "content": None}, *({**one, "weight": None, "audio": {}} for one in row.prompt), None]
    return {"prompt": prompt, "chosen": [row.chosen, nothing], "rejected": [row.rejected, None], "functions": None}


def _parts(row: Conversation) -> dict[str, Any]:
    """Texts in parts."""

    def cut(message: dict[str, Any]) -> dict[str, Any]:
        text = message.get("content")
        if not isinstance(text, str):
            return message
        parts = [{"type": "text", "text": text[:3], "image_url": None}, {"type": "text", "text": text[3:]}]
        return {**message, "content": parts}

    return _conversational(Conversation([cut(one) for one in row.prompt], cut(row.chosen), cut(row.rejected)))


def _tools_as_text(row: Conversation) -> dict[str, Any]:
    columns = {name: json.dumps(row.columns[name]) for name in ("tools", "documents") if name in row.columns}
    return {**_conversational(row), **columns}


FORMS = {
    "conversational": _conversational,
    "one object": _objects,
    "implicit": _whole,
    "continued": _continued,
    "ranked": _ranked,
    "padded": _padded,
    "parts": _parts,
    "tools as text": _tools_as_text,
}


def rows() -> Iterator[tuple[str, str, Conversation, dict[str, Any]]]:
    """Every conversation in every form: names of both, the conversation, and the row."""
    for (name, conversation), (form, write) in itertools.product(CONVERSATIONS.items(), FORMS.items()):
        yield name, form, conversation, copy.deepcopy({**conversation.columns, **write(conversation)})


class Oracle:
    """What a template makes of conversations, by ``transformers``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def expected(self, row: Conversation) -> tuple[str, str, str] | None:
        """Texts of prompt, chosen and rejected; ``None`` where the row is not to be used."""
        known = {message["role"] for message in row.prompt} <= {"system", "user", "assistant"} or self._knows_roles(row)
        prompt = self._write(row.prompt, row.columns, True)
        if row.bad or not known or prompt is None or self._leaves_out(row.prompt, row.columns, True):
            return None
        responses = [self._response(row, message, prompt) for message in (row.chosen, row.rejected)]
        return None if None in responses else (prompt, *responses)  # type: ignore[return-value]

    def _write(self, messages: list[dict[str, Any]], columns: dict[str, Any], opened: bool) -> str | None:
        variables = {name: columns[name] for name in ("tools", "documents", "mood") if columns.get(name)}
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, chat_template=self._template, add_generation_prompt=opened, tokenize=False, **variables
            )
        except Exception:  # a template can raise anything
            return None

    def _knows_roles(self, row: Conversation) -> bool:
        roles = {message["role"] for message in row.prompt} - {"system", "user", "assistant"}
        return all(f"'{role}'" in self._template for role in roles)

    def _leaves_out(self, messages: list[dict[str, Any]], columns: dict[str, Any], opened: bool) -> bool:
        """Whether a field that means something means nothing to the template: other strings, the same text."""
        text = self._write(messages, columns, opened)
        for number, message in enumerate(messages):
            for name in MEANT.intersection(message):
                turns = [*messages[:number], {**message, name: _other(message[name])}, *messages[number + 1 :]]
                reasoning = name in ("reasoning_content", "thinking") and number < len(messages) - 1
                # Reasoning of earlier turns is left out by those that know it.
                if self._write(turns, columns, opened) == text and not (
                    reasoning and re.search("reasoning|thinking", self._template)
                ):
                    return True
        return any(
            self._write(messages, {**columns, name: _other(columns[name])}, opened) == text
            for name in MEANT.intersection(columns)
            if columns[name]
        )

    def _response(self, row: Conversation, message: dict[str, Any], prompt: str) -> str | None:
        turns = [*row.prompt, message]
        if not MEANT.intersection(message):
            plain = [*row.prompt, {"role": "assistant", "content": message["content"]}]
            if self._write(turns, row.columns, False) == self._write(plain, row.columns, False):
                return message["content"]
        whole = self._write(turns, row.columns, False)
        closing = "<|im_end|>\n"
        if whole is None or not (whole.startswith(prompt) and whole.endswith(closing)):
            return None
        text = whole[len(prompt) : -len(closing)]
        plain = self._write([*row.prompt, {"role": "assistant", "content": "MARK"}], row.columns, False) or ""
        text = text.removeprefix(plain[len(prompt) :].partition("MARK")[0])
        if self._leaves_out(turns, row.columns, False) or (message.get("content") or "").strip() not in text:
            return None
        return text if text.strip() else None


def _other(value: Any) -> Any:
    if isinstance(value, str):
        return value + "other"
    if isinstance(value, list):
        return [_other(item) for item in value]
    return {name: _other(part) for name, part in value.items()} if isinstance(value, dict) else value
