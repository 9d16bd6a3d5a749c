"""What a template writes around turns, found out by rendering a few conversations once, before any data."""

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ctpd_nemo.data.chat_template import ChatTemplate, RefusedConversationError
from ctpd_nemo.data.control_tokens import first_added_token
from ctpd_nemo.data.messages import Message
from ctpd_nemo.data.turns import (
    AS_RENDERED,
    REASONING_TAGS,
    WHITE_SPACE,
    MismatchError,
    TurnStyle,
    around,
    read_response,
    shared_length,
    turn_opening,
)
from ctpd_nemo.errors import InputError

_SYSTEM, _USER = Message("system", "x"), Message("user", "x")
# Ordinary text, with what a careless template would change.
_PLAIN = 'Yes.\n\n  It\'s 4 < 5 & "so on" | \\n {x}: \u00e9\U0001f642'
_PADDED = " \n Yes. \n "
OF_RESPONSES = "data.response_text"
_ANOTHER = ("chat_template", "=FILE gives another template")


@dataclass(frozen=True, slots=True)
class Note:
    """A difference that a user can choose.

    Attributes:
        what: Where it is.
        trained: The text that is trained.
        other: The text that is not, of a conversation or of a prompt for generation.
        other_is: Which of them.
        key: What decides it: ``data.response_text``, or a key of the side.
        remedy: A value of that key, and what it does.
    """

    what: str
    trained: str
    other: str
    key: str
    remedy: str
    other_is: str = "the template writes"

    def line(self, side: str) -> str:
        """It as a warning; ``side`` is the key of the side, as ``model.student``."""
        key = self.key if "." in self.key else f"{side}.{self.key}"
        texts = f"trained is {self.trained!r}, {self.other_is} {self.other!r}"
        return f"{side}, chat template, {self.what}: {texts}; {key}{self.remedy}"


class TemplateProbe:
    """A look at a template.

    Attributes:
        style: How it writes an assistant's turn.
        end_of_turn_ids: int32 ``[n]``, see ``Side``.
        notes: Differences that a user can choose.
        printed: All that it was seen to print, and its own text.
        turns: What it prints around plain turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        """Render the probes.

        Raises:
            InputError: The template cannot be rendered; it writes a turn otherwise than prompt, response and end of
                turn; nothing ends a turn.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._marker = uuid.uuid4().hex
        prompt, conversation = self._plain_turn()
        before, _, closing = conversation.rpartition(self._marker)
        try:
            found, trained = turn_opening(prompt, before)
        except MismatchError as error:
            raise self._no_opening(error, prompt, before) from error
        between = self._between_turns()
        end = self._end_text(closing, between)
        self.style = TurnStyle(found, trained, closing, end)
        self.end_of_turn_ids = self._end_ids(conversation, len(before) + len(self._marker), closing, end)
        self._check_plain()
        self.notes = (*self._notes_on_turn(prompt, before, closing), *self._notes_on_responses())
        self.turns = "\0".join([prompt, before, closing, *self._many_turns()])
        self.printed = "\0".join([self.turns, template.text])

    def _plain_turn(self) -> tuple[str, str]:
        """A prompt, and the conversation that a response makes of it."""
        conversation = self._template.render([_USER, Message("assistant", self._marker)], add_generation_prompt=False)
        if self._marker not in conversation:
            found, expected = "a template that drops an assistant's text", "one that renders it"
            raise InputError(self._template.place(), found, expected)
        return self._template.render([_USER]), conversation

    def _no_opening(self, error: MismatchError, prompt: str, before: str) -> InputError:
        has_none = self._template.render([_USER], add_generation_prompt=False) == prompt and before.startswith(prompt)
        found = (
            f"{'no generation prompt, and so ' if has_none else ''}a prompt that ends {error.trained!r}, where a"
            f" finished conversation has {error.written!r} before a response"
        )
        expected = "a template whose prompt (add_generation_prompt) opens the assistant's turn as it does"
        return InputError(self._template.place(), found, expected)

    def _many_turns(self) -> list[str]:
        """What it prints of longer conversations; one that it refuses is for rows to meet."""
        answered = [_USER, Message("assistant", "x")]
        rendered = []
        for conversation in ([_SYSTEM, _USER], [*answered, _USER], [_SYSTEM, *answered, _USER]):
            with contextlib.suppress(RefusedConversationError):
                rendered.append(self._template.render(conversation))
        return rendered

    def _between_turns(self) -> str:
        """What stands behind an assistant's turn that is not the last."""
        try:
            turns = [_USER, Message("assistant", self._marker), _USER]
            return self._template.render(turns).rpartition(self._marker)[2]
        except RefusedConversationError:
            return ""

    def _end_text(self, closing: str, between: str) -> str:
        """The part of what follows a response that ends its turn: up to the first token that is one by itself."""
        text = closing.lstrip()
        token = first_added_token(self._tokenizer, text)
        if token is not None:
            return text[: token.end()]
        # Of text, what follows every turn ends one; what only follows the last ends the conversation.
        return (closing[: shared_length(closing, between)] if between else closing).strip()

    def _end_ids(self, conversation: str, at: int, closing: str, end: str) -> NDArray[np.int32]:
        token = first_added_token(self._tokenizer, end)
        if token is not None and token[0] == end:
            return np.array([self._tokenizer.convert_tokens_to_ids(end)], dtype=np.int32)
        eos = self._tokenizer.eos_token_id
        if token is None and eos is None:
            found = "no special token behind an assistant's text, and no EOS token"
            raise InputError(self._template.place(), found, "one of the two, to end a turn")
        begin = at + len(closing) - len(closing.lstrip())
        ids = self._ids_of(conversation, begin, begin + len(end)) if end else []
        return np.array(ids if token is not None else [*ids, eos], dtype=np.int32)

    def _ids_of(self, text: str, begin: int, end: int) -> list[int]:
        """The tokens of a part of a text, as they stand in it; by themselves where one reaches over its beginning."""
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        own = [(index, offsets[0]) for index, offsets in places if begin <= offsets[0] < end]
        if own and own[0][1] == begin:
            return [index for index, _ in own]
        return list(self._tokenizer(text[begin:end], add_special_tokens=False)["input_ids"])

    def _rendered(self, response: str) -> tuple[str, str]:
        messages = [_USER, Message("assistant", response)]
        return self._template.render([_USER]), self._template.render(messages, add_generation_prompt=False)

    def _check_plain(self) -> None:
        """Stop where plain text does not stand in its turn as it is."""
        prompt, conversation = self._rendered(_PLAIN)
        try:
            read_response(self.style, prompt, conversation, _PLAIN)
        except MismatchError as error:
            found = f"a template that writes {error.written!r} where training has {error.trained!r}"
            raise InputError(self._template.place(), found, "one that writes a response as it is") from error

    def _notes_on_turn(self, prompt: str, before: str, closing: str) -> Iterator[Note]:
        """Of what stands around a response."""
        if self.style.found != AS_RENDERED:
            at_inference, written = around(prompt, before)
            if self.style.trained != AS_RENDERED:
                remedy = self._variable_that_helps()
                yield Note("before a response", written, at_inference, *remedy, other_is="its prompt for generation is")
            else:
                yield Note("before a response", at_inference, written, *_ANOTHER)
        trained_end = str(self._tokenizer.decode(self.end_of_turn_ids))
        glue = closing[: len(closing) - len(closing.lstrip())] if self.style.end else ""
        eos_added = not self.style.end or first_added_token(self._tokenizer, self.style.end) is None
        if glue or eos_added:
            yield Note("behind a response", trained_end, closing, *_ANOTHER)

    def _variable_that_helps(self) -> tuple[str, str]:
        """The key and the value that make prompt and conversation agree: a variable of the template, or another one."""
        for name in sorted(self._template.own_names):
            for value in (False, True):
                with contextlib.suppress(RefusedConversationError):
                    variables = {name: value}
                    prompt = self._template.render([_USER], variables=variables)
                    turns = [_USER, Message("assistant", self._marker)]
                    conversation = self._template.render(turns, add_generation_prompt=False, variables=variables)
                    if conversation.startswith(prompt + self._marker):
                        return "chat_template_kwargs", f"={{{name}: {str(value).lower()}}} makes them alike"
        return _ANOTHER

    def _notes_on_responses(self) -> Iterator[Note]:
        """Of what it makes of a response."""
        opened, closed = next(
            (tags for tags in REASONING_TAGS if any(tag in self._template.text for tag in tags)), REASONING_TAGS[0]
        )
        reasoned = f"{opened}\nThey add up.\n{closed}\n\nYes."
        for response in (_PADDED, reasoned):
            try:
                prompt, conversation = self._rendered(response)
                reading = read_response(self.style, prompt, conversation, response)
            except (MismatchError, RefusedConversationError):
                # Rows that are like it are named, or skipped.
                continue
            if reading.difference:
                what = f"{'white space around' if reading.difference == WHITE_SPACE else 'reasoning in'} a response"
                yield Note(what, response, reading.text, OF_RESPONSES, "=rendered trains what it writes")
