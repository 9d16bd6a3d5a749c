"""How one model reads a conversation: its tokenizer and its chat template.

A prompt's ids are those inference uses: the rendered template, tokenized in one go, without a second BOS. With one
difference: a control token's string inside a message (``<|im_end|>``) is text. Which control tokens a prompt holds is
decided by the template alone.

What stands before a response in training is what the template writes there in a finished conversation. Mostly that is
the prompt; ``turns`` says where it is not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ctpd_nemo.data.chat_template import ChatTemplate, RefusedConversationError
from ctpd_nemo.data.control_tokens import ControlTokens, HiddenControlError, RewrittenControlError
from ctpd_nemo.data.messages import BASIC_ROLES, Message
from ctpd_nemo.data.template_probe import TemplateProbe
from ctpd_nemo.data.turns import AS_RENDERED, MismatchError, Opening, Reading, read_response
from ctpd_nemo.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands before a response.

    Attributes:
        messages: The conversation.
        rendered: Its text, for generation.
        opening: What is trained at its end instead.
        place: Where it was read, for errors.
        fields: What else the template is given for this conversation.
    """

    messages: Sequence[Message]
    rendered: str
    opening: Opening = AS_RENDERED
    place: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is text alone, of roles that every template knows."""
        return not self.fields and all(one.role in BASIC_ROLES and not one.extra for one in self.messages)


class Side:
    """One side of a pair of models: renders and tokenizes prompts, knows what ends a turn.

    Attributes:
        tokenizer: The Hugging Face fast tokenizer; it is only read.
        template: The chat template at work.
        chat_template: Its text.
        chat_template_kwargs: Variables that the template is given.
        style: How the template writes an assistant's turn.
        reader: What responses are tokenized with: the tokenizer, in which the strings of control tokens are text.
        end_of_turn_ids: int32 ``[n]``, what the model writes when its turn is over: what the template puts behind an
            assistant's text, up to the first token that stands for an end; mostly one special token. The tokenizer's
            EOS where the template puts nothing, and behind text that is no token of its own. Generation stops at the
            last of them.
        pad_token_id: An id to fill padding with. Nothing tells padding by its id.
        notes: Differences between what is trained and what the template writes that a user can choose.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check a tokenizer and its template.

        Args:
            tokenizer: A fast tokenizer.
            chat_template: A Jinja template or the path of one; by default the tokenizer's own.
            chat_template_kwargs: Variables for the template, such as ``enable_thinking``.

        Raises:
            InputError: The tokenizer is not a fast one; there is no template, it cannot be rendered, does not read a
                variable, or writes a turn otherwise than prompt, response and end of turn; nothing ends a turn.
        """
        place = f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
        if not tokenizer.is_fast:
            raise InputError(place, f"a {type(tokenizer).__name__}", "a Hugging Face fast tokenizer")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template, chat_template_kwargs, place)
        self.chat_template = self.template.text
        self.chat_template_kwargs = self.template.variables
        probe = TemplateProbe(tokenizer, self.template)
        self.style = probe.style
        self.end_of_turn_ids = probe.end_of_turn_ids
        self.notes = probe.notes
        self._controls = ControlTokens(tokenizer, probe.printed, probe.turns)
        self.reader = self._controls.reader
        self._template_controls: dict[tuple[tuple[str, ...], Opening], NDArray[np.int64]] = {}
        # Of the tokenizer's own pad token the weights may have no row: some add one behind all others.
        self.pad_token_id = int(self.end_of_turn_ids[-1])

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's content, whatever folder it was loaded from."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def template_fingerprint(self) -> str:
        """Hash of the template, of the special tokens it may print, its variables, and of what surrounds a response."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        content: list[Any] = [self.chat_template, special, self.end_of_turn_ids.tolist()]
        # What is usual says nothing: caches and checkpoints of before know it by these three alone.
        if self.chat_template_kwargs:
            content.append({"variables": self.chat_template_kwargs})
        if self.style.trained != AS_RENDERED:
            content.append({"opening": [self.style.trained.removed, self.style.trained.added]})
        if self.template.other_dates:
            content.append({"date": "by its format"})
        return _fingerprint(json.dumps(content, sort_keys=True))

    def reads_responses_as(self, other: "Side") -> bool:
        """Whether both sides make the same tokens of any response."""
        return (
            self.tokenizer_fingerprint == other.tokenizer_fingerprint
            and self._controls.guarded == other._controls.guarded
        )

    def render_text(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        place: str = "",
        fields: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether the assistant's turn is opened behind it.
            place: Where it was read, for errors.
            fields: What else the template is given for this conversation, tools among them.

        Raises:
            RefusedConversationError: The template refuses the conversation.
        """
        return self.template.render(messages, add_generation_prompt, place, fields)

    def check_roles(self, role_orders: Mapping[tuple[str, ...], str]) -> None:
        """Answer a prompt of each order of roles, so that a template that cannot is known before any work.

        Args:
            role_orders: Orders of roles, and the place of a prompt that has it.

        Raises:
            RefusedConversationError: The template refuses one, or writes it otherwise once it is answered.
        """
        prompts = [[Message(role, "x") for role in roles] for roles in role_orders]
        places = list(role_orders.values())
        for prompt, place in zip(prompts, places, strict=True):
            self.read(prompt, ["x"], place)
        self.render_prompts(prompts, places)

    def read(
        self,
        prompt: Sequence[Message],
        responses: Sequence[str],
        place: str = "",
        fields: Mapping[str, Any] | None = None,
        turns: Mapping[int, Message] | None = None,
    ) -> tuple[str, list[Reading]]:
        """Render a prompt and find each response in the conversation that ends with it.

        Args:
            prompt: Conversation that ends with a user's turn.
            responses: To it.
            place: Where they were read, for errors.
            fields: What else the template is given.
            turns: The messages of responses, by their number, of which the template makes more than their text.

        Returns:
            The prompt's text, for generation; and of each response where it stands.

        Raises:
            RefusedConversationError: The template refuses a conversation, or does not write it as prompt, response and
                end of turn.
        """
        rendered = self.render_text(prompt, place=place, fields=fields)
        readings = []
        for number, response in enumerate(responses):
            turn = (turns or {}).get(number) or Message("assistant", response)
            conversation = self.render_text([*prompt, turn], False, place, fields)
            try:
                readings.append(read_response(self.style, rendered, conversation, response))
            except MismatchError as error:
                raise RefusedConversationError(
                    self.template.place(place),
                    f"a template that writes {error.written!r} where training has {error.trained!r}",
                    "one that writes prompt, response and end of turn as they are",
                    "rewritten_by_template",
                ) from error
        return rendered, readings

    def render_prompts(
        self,
        prompts: Sequence[Sequence[Message]],
        places: Sequence[str] | None = None,
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[NDArray[np.int32]]:
        """Ids of prompts, up to and with the opening of the assistant's turn, as for generation.

        Args:
            prompts: Conversations that end with a user's turn.
            places: Where each was read, for errors.
            fields: What else the template is given for each.

        Returns:
            int32 ``[n_tokens]`` for each.

        Raises:
            RefusedConversationError: The template refuses a conversation or renders nothing, or it changes a control
                token's string that stands in a message.
        """
        places = [""] * len(prompts) if places is None else places
        fields = [{}] * len(prompts) if fields is None else fields
        rows = zip(prompts, places, fields, strict=True)
        return self.encode_prompts(
            [
                Prompt(one, self.render_text(one, place=place, fields=own), AS_RENDERED, place, own)
                for one, place, own in rows
            ]
        )

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[NDArray[np.int32]]:
        """Ids of what stands before responses; results and errors as of ``render_prompts``."""
        if not prompts:
            return []
        texts = [self._opened(prompt.rendered, prompt.opening, prompt.place) for prompt in prompts]
        rows = []
        for prompt, text, ids in zip(prompts, texts, self._encode(texts), strict=True):
            # What is more than text of the usual roles may have a template write other control tokens.
            by_role = not prompt.is_plain or self._controls.written_by(prompt.messages, prompt.fields)
            if by_role or not np.array_equal(self._controls.of(ids), self._controls_of_template(prompt)):
                ids = self._encode_by_role(prompt, text)
            if not len(ids):
                place, expected = self.template.place(prompt.place), "a template that opens a turn"
                raise RefusedConversationError(place, "a prompt of no tokens", expected)
            rows.append(ids.astype(np.int32))
        return rows

    def render_prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Ids of one prompt; see ``render_prompts``."""
        return self.render_prompts([messages])[0]

    def _opened(self, rendered: str, opening: Opening, place: str) -> str:
        text = opening.of(rendered)
        if text is None:
            found = f"a prompt that does not end {opening.removed!r}"
            raise RefusedConversationError(self.template.place(place), found, "one that ends as all others")
        return text

    def _encode(self, texts: list[str]) -> list[NDArray[np.int64]]:
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in rows]

    def _controls_of_template(self, prompt: Prompt) -> NDArray[np.int64]:
        """The control tokens that the template writes around messages of these roles, in order."""
        roles = tuple(message.role for message in prompt.messages)
        key = (roles, prompt.opening)
        if key not in self._template_controls:
            plain = self.render_text([Message(role, "x") for role in roles])
            blank = self._opened(plain, prompt.opening, prompt.place)
            self._template_controls[key] = self._controls.of(self._encode([blank])[0])
        return self._template_controls[key]

    def _encode_by_role(self, prompt: Prompt, text: str) -> NDArray[np.int64]:
        """Tokenize a prompt's text with the control tokens of the template alone."""
        place = self.template.place(prompt.place)

        def render(messages: Sequence[Message], fields: Mapping[str, Any]) -> str:
            rendered = self.render_text(messages, place=prompt.place, fields=fields)
            return self._opened(rendered, prompt.opening, prompt.place)

        try:
            return self._controls.encode(prompt.messages, prompt.fields, text, render)
        except RewrittenControlError as error:
            found = "a message with a control token's string, which the template does not print as it is"
            expected = "no " + " or ".join(error.strings)
            raise RefusedConversationError(place, found, expected) from error
        except HiddenControlError as error:
            found = "a message in which the tokenizer's model sees a control token"
            expected = "control tokens that only their own strings make"
            raise RefusedConversationError(place, found, expected) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a fast tokenizer's content, whatever folder it was loaded from."""
    # In front stand truncation and padding: left there by whoever called the tokenizer last, no part of what it is.
    _, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
    return _fingerprint(content)


def _fingerprint(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
