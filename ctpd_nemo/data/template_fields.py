"""What a chat template makes of a row beside roles and texts: tools, calls, reasoning, and whatever else it reads.

What carries meaning is rendered, or the row is refused: with it and without it the template must not write the same.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.chat_template import GIVEN, RefusedConversationError
from ctpd_nemo.data.forms import FIELDS, PreferencePair
from ctpd_nemo.data.messages import (
    BASIC_ROLES,
    MEANT_IN_MESSAGES,
    MEANT_IN_ROWS,
    REASONING,
    TOOL_ROLES,
    KeptFields,
    Message,
)
from ctpd_nemo.data.templates import Side


class FieldReader:
    """One side's reading of rows that are more than text."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._renders: dict[str, bool] = {}

    @cached_property
    def kept(self) -> KeptFields:
        """What of a row the template may render."""
        template, given = self._side.template, GIVEN - {"tools", "documents"} | set(FIELDS)
        given |= set(self._side.tokenizer.special_tokens_map)
        named = KeptFields(template.names_read - given, template.words, self._writes_all_fields())
        return KeptFields() | named

    def check(self, pair: PreferencePair) -> None:
        """Stop where the template leaves out what carries meaning in the prompt of a pair.

        Raises:
            RefusedConversationError: It names the field.
        """
        if pair.is_plain:
            return
        text = self._side.render_text(pair.prompt, place=pair.place, fields=pair.fields)
        for number, message in enumerate(pair.prompt):
            if message.role not in BASIC_ROLES:
                self._check_role(pair, number)
        for name in sorted(MEANT_IN_ROWS.intersection(pair.fields)):
            fields = {key: value for key, value in pair.fields.items() if key != name}
            if self._writes(pair.prompt, fields) == text:
                raise self._unread(pair.place, name)
        for number, message in enumerate(pair.prompt):
            for names, less in _without_each(message):
                turns = [*pair.prompt[:number], less, *pair.prompt[number + 1 :]]
                # Templates drop the reasoning of earlier turns on purpose.
                by_design = names <= set(REASONING) and any(map(self._renders_reasoning, names))
                if not by_design and self._writes(turns, pair.fields) == text:
                    raise self._unread(pair.place, f"prompt[{number}].{min(names)}")

    def response(self, pair: PreferencePair, name: str) -> str:
        """The text of a response: for one that is more than its text, what the template writes as the turn.

        Args:
            pair: It has been checked.
            name: "chosen" or "rejected".

        Raises:
            RefusedConversationError: The template does not write such a turn as prompt, response and end of turn; it
                leaves out a part of it, or writes control tokens into it.
        """
        message = pair.whole.get(name)
        if message is None:
            return pair.chosen if name == "chosen" else pair.rejected

        def written(turn: Message) -> str | None:
            return self._writes([*pair.prompt, turn], pair.fields, add_generation_prompt=False)

        conversation = self._side.render_text([*pair.prompt, message], False, pair.place, pair.fields)
        if not MEANT_IN_MESSAGES.intersection(message.extra):
            plain = Message(message.role, message.content)
            if written(plain) == conversation:
                return message.content
        for names, less in _without_each(message):
            if written(less) == conversation:
                raise self._unread(pair.place, f"{name}.{min(names)}")
        opening = self._side.render_text(pair.prompt, place=pair.place, fields=pair.fields)
        style = self._side.style
        text = conversation.removeprefix(opening).removesuffix(style.closing)
        if conversation != opening + text + style.closing or not text.strip():
            found = f"a template that does not write {name} as prompt, response and end of turn"
            raise self._refused(pair.place, found, "one that does", "rewritten_by_template")
        if message.content.strip() not in text:
            found = f"a template that leaves out the text of {name} beside its {', '.join(sorted(message.extra))}"
            raise self._refused(pair.place, found, "one that renders both", "rewritten_by_template")
        for token in self._written_tokens(message, text, special=True).values():
            found = f"the control token {token!r} in what the template writes of {name}"
            raise self._refused(pair.place, found, "a response of text", "rewritten_by_template")
        # An empty block of reasoning, say: what stands before any response is no part of it.
        return text if style.found.removed else text.removeprefix(style.found.added)

    def check_tokens(self, pair: PreferencePair, name: str, text: str, ids: NDArray[Any]) -> None:
        """Stop where an added token that the template writes in a response is not that token among its ids.

        Raises:
            RefusedConversationError: It names the token.
        """
        if name not in pair.whole:
            return
        for index, token in self._written_tokens(pair.whole[name], text, special=False).items():
            if not np.any(ids == index):
                found = f"the token {token!r} in what the template writes of {name}, read as text"
                raise self._refused(pair.place, found, "a response of text", "rewritten_by_template")

    def _written_tokens(self, message: Message, text: str, special: bool) -> dict[int, str]:
        """Added tokens whose strings stand in a text more often than in the message that it is made of."""
        own = "\0".join(message.texts())
        return {
            index: token.content
            for index, token in self._side.tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (token.special or token.content in self._side.tokenizer.all_special_tokens) == special
            and text.count(token.content) > own.count(token.content)
        }

    def _check_role(self, pair: PreferencePair, number: int) -> None:
        """Stop at a role that the template does not name, or whose text it leaves out."""
        message, mark = pair.prompt[number], uuid.uuid4().hex
        marked = Message(message.role, message.content + mark, message.extra)
        turns = [*pair.prompt[:number], marked, *pair.prompt[number + 1 :]]
        if message.role not in self._side.template.words or mark not in (self._writes(turns, pair.fields) or ""):
            found = f"role {message.role!r}, which the template does not know"
            raise self._refused(pair.place, found, "roles that it names", "unknown_role")

    def _writes(
        self, messages: Sequence[Message], fields: Mapping[str, Any], add_generation_prompt: bool = True
    ) -> str | None:
        """What the template writes; ``None`` where it refuses."""
        try:
            return self._side.render_text(messages, add_generation_prompt, fields=fields)
        except RefusedConversationError:
            return None

    def _writes_all_fields(self) -> bool:
        """Whether it writes fields of messages whose names it cannot know."""
        name, value = (f"x{uuid.uuid4().hex}" for _ in range(2))
        turns = [Message(role, "x", {name: value}) for role in ("user", "assistant", "user")]
        text = self._writes(turns, {}) or ""
        return name in text or value in text

    def _renders_reasoning(self, name: str) -> bool:
        """Whether it writes the reasoning of a last turn that has it by this name."""
        if name not in self._renders:
            mark = uuid.uuid4().hex
            turns = [Message("user", "x"), Message("assistant", "x", {name: mark})]
            self._renders[name] = mark in (self._writes(turns, {}, add_generation_prompt=False) or "")
        return self._renders[name]

    def _unread(self, place: str, field: str) -> RefusedConversationError:
        expected = "a template that renders it, or rows without it"
        return self._refused(f"{place}, field {field!r}", "what the template does not render", expected, "unread_field")

    def _refused(self, place: str, found: str, expected: str, reason: str) -> RefusedConversationError:
        return RefusedConversationError(self._side.template.place(place), found, expected, reason)


def _without_each(message: Message) -> Iterator[tuple[set[str], Message]]:
    """The message without each field that carries meaning; names of one and the same reasoning go together."""
    left = sorted(MEANT_IN_MESSAGES.intersection(message.extra))
    if message.role in TOOL_ROLES:
        # The name of a tool whose call says it.
        left = [name for name in left if name != "name"]
    while left:
        names = {left[0]}
        if left[0] in REASONING:
            names |= {name for name in left if name in REASONING and message.extra[name] == message.extra[left[0]]}
        left = [name for name in left if name not in names]
        extra = {name: value for name, value in message.extra.items() if name not in names}
        yield names, Message(message.role, message.content, extra, message.no_content)


def kept_fields(readers: Sequence[FieldReader]) -> KeptFields:
    """What of a row any side may render."""
    kept = KeptFields()
    for reader in readers:
        kept |= reader.kept
    return kept
