"""How one model reads a conversation: its tokenizer and its chat template.

A prompt's ids are those inference uses: the rendered template, tokenized in one go, without a second BOS. With one
difference: a control token's string inside a message (``<|im_end|>``) is text. Which control tokens a prompt holds is
decided by the template alone.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.time_limit import time_limit
from ctpd_nemo.errors import InputError
from ctpd_nemo.spans.text_backend import text_backend

# A template that prints today's date would render other prompts tomorrow: cached scores would no longer belong to them,
# and a resumed run would not continue the one before. The date is the one Llama-3's templates fall back to.
_PINNED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
# A template is a program of whoever made the tokenizer. Real ones take a millisecond, and write messages once.
_RENDER_SECONDS = 10.0
_MOST_ADDED = 1_000_000
_MOST_COPIES = 16


class Side:
    """One side of a pair of models: renders and tokenizes prompts, knows what ends a turn.

    Attributes:
        tokenizer: The Hugging Face fast tokenizer; it is only read.
        chat_template: The Jinja template in use.
        end_of_turn_ids: int32 ``[1]``, what the model writes when its turn is over: the special token that the template
            puts behind an assistant's text, the tokenizer's EOS where it puts none.
        pad_token_id: An id to fill padding with. Nothing tells padding by its id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | Path | None = None) -> None:
        """Check a tokenizer and its template.

        Args:
            tokenizer: A fast tokenizer.
            chat_template: A Jinja template or the path of one; by default the tokenizer's own.

        Raises:
            InputError: The tokenizer is not a fast one; there is no template, or it cannot be rendered; nothing ends a
                turn.
        """
        self._place = f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
        if not tokenizer.is_fast:
            raise InputError(self._place, f"a {type(tokenizer).__name__}", "a Hugging Face fast tokenizer")
        self.tokenizer = tokenizer
        self.chat_template = self._find_template(chat_template)
        roles = set(tokenizer.all_special_tokens)
        self._control_tokens = {
            index: token.content
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in roles
        }
        # A model may write its unknown token for any text. GPT-2's never does: there that name is one more of EOS's.
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._control_ids = np.array(sorted(set(self._control_tokens) - unknown), dtype=np.int64)
        longest_first = sorted(self._control_tokens.values(), key=len, reverse=True)
        # The empty lookahead matches nowhere, as an empty list of tokens should.
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._template_controls: dict[tuple[str, ...], NDArray[np.int64]] = {}
        self.end_of_turn_ids = self._find_end_of_turn()
        # Of the tokenizer's own pad token the weights may have no row: some add one behind all others.
        self.pad_token_id = int(self.end_of_turn_ids[-1])

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Hash of the tokenizer's content, whatever folder it was loaded from."""
        return tokenizer_fingerprint(self.tokenizer)

    @cached_property
    def template_fingerprint(self) -> str:
        """Hash of the template, of the special tokens it may print, and of the end of turn."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return _fingerprint(json.dumps([self.chat_template, special, self.end_of_turn_ids.tolist()], sort_keys=True))

    def render_text(self, messages: Sequence[Message], add_generation_prompt: bool = True, place: str = "") -> str:
        """The conversation as the template writes it; ``place`` says in an error where the messages came from.

        Raises:
            InputError: The template refuses the conversation.
        """
        template = self.chat_template
        if "strftime_now" in template:
            template = _PINNED_DATE + template
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        roles = ", ".join(message.role for message in messages)
        try:
            # transformers renders in Jinja's sandbox, where a template reaches neither files nor modules.
            with time_limit(_RENDER_SECONDS):
                text = self.tokenizer.apply_chat_template(
                    conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
                )
        except Exception as error:  # a template is a program: it can raise anything
            found = f"a template that fails on the roles {roles} ({str(error) or type(error).__name__})"
            raise InputError(self._template_place(place), found, "a template that renders them") from error
        assert isinstance(text, str)
        given = sum(len(message.content) for message in messages)
        if len(text) > _MOST_ADDED + _MOST_COPIES * given:
            found = f"a template that makes {len(text):,} characters of {given:,}"
            raise InputError(self._template_place(place), found, "a template that renders messages")
        return text

    def check_roles(self, role_orders: Mapping[tuple[str, ...], str]) -> None:
        """Render a prompt of each order of roles, so that a template that refuses one is known before any work.

        Args:
            role_orders: Orders of roles, and the place of a prompt that has it.

        Raises:
            InputError: The template refuses one.
        """
        prompts = [[Message(role, "x") for role in roles] for roles in role_orders]
        self.render_prompts(prompts, list(role_orders.values()))

    def render_prompts(
        self, prompts: Sequence[Sequence[Message]], places: Sequence[str] | None = None
    ) -> list[NDArray[np.int32]]:
        """Ids of prompts, up to and with the opening of the assistant's turn.

        Args:
            prompts: Conversations that end with a user's turn.
            places: Where each was read, for errors.

        Returns:
            int32 ``[n_tokens]`` for each.

        Raises:
            InputError: The template refuses a conversation or renders nothing, or it changes a control token's string
                that stands in a message.
        """
        if not prompts:
            return []
        places = [""] * len(prompts) if places is None else places
        texts = [self.render_text(prompt, place=place) for prompt, place in zip(prompts, places, strict=True)]
        rows = []
        for prompt, place, text, ids in zip(prompts, places, texts, self._encode(texts), strict=True):
            written_by_user = any(self._control_pattern.search(message.content) for message in prompt)
            if written_by_user or not np.array_equal(self._controls_of(ids), self._controls_of_template(prompt)):
                ids = self._encode_by_role(prompt, text, place)
            if not len(ids):
                raise InputError(self._template_place(place), "a prompt of no tokens", "a template that opens a turn")
            rows.append(ids.astype(np.int32))
        return rows

    def render_prompt(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Ids of one prompt; see ``render_prompts``."""
        return self.render_prompts([messages])[0]

    def _template_place(self, place: str = "") -> str:
        return f"{place}, {self._place}, chat template".removeprefix(", ")

    def _find_template(self, given: str | Path | None) -> str:
        if given is None:
            if not self.tokenizer.chat_template:
                raise InputError(self._place, "no chat template", "one in the tokenizer's folder or in the config")
            try:
                template = self.tokenizer.get_chat_template()
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self._place}, chat template", str(error), "one template, or a default") from error
            if not isinstance(template, str):
                found = f"a {type(template).__name__}"
                raise InputError(f"{self._place}, chat template", found, "the text of a Jinja template")
            return template
        if isinstance(given, str) and "{" in given:
            return given
        path = Path(given)
        try:
            if path.is_file():
                return path.read_text(encoding="utf-8")
            found = f"no file {str(given)!r}"
        except (OSError, UnicodeDecodeError) as error:
            found = f"a file that cannot be read ({error})"
        raise InputError("chat_template", found, "a Jinja template or the path of one")

    def _find_end_of_turn(self) -> NDArray[np.int32]:
        response = uuid.uuid4().hex
        text = self.render_text([Message("user", "x"), Message("assistant", response)], add_generation_prompt=False)
        if response not in text:
            raise InputError(self._template_place(), "a template that drops an assistant's text", "one that renders it")
        control = self._control_pattern.match(text.rpartition(response)[2].lstrip())
        if control:
            return np.array([self.tokenizer.convert_tokens_to_ids(control[0])], dtype=np.int32)
        if self.tokenizer.eos_token_id is None:
            found = "no special token behind an assistant's text, and no EOS token"
            raise InputError(self._template_place(), found, "one of the two, to end a turn")
        return np.array([self.tokenizer.eos_token_id], dtype=np.int32)

    def _encode(self, texts: list[str]) -> list[NDArray[np.int64]]:
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int64) for row in rows]

    def _controls_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids[np.isin(ids, self._control_ids)]

    def _controls_of_template(self, prompt: Sequence[Message]) -> NDArray[np.int64]:
        """The control tokens that the template writes around messages of these roles, in order."""
        roles = tuple(message.role for message in prompt)
        if roles not in self._template_controls:
            blank = self.render_text([Message(role, "x") for role in roles])
            self._template_controls[roles] = self._controls_of(self._encode([blank])[0])
        return self._template_controls[roles]

    @cached_property
    def _role_backend(self) -> tuple[Tokenizer, dict[str, tuple[int, str]]]:
        """A copy of the tokenizer whose control tokens have unguessable strings; by real string, id and that string.

        Its model cannot build a control token from text either, so a string becomes one only where we put it.
        """
        backend, spec = text_backend(self.tokenizer)
        backend.encode_special_tokens = False
        secret = {token["id"]: token["content"] for token in spec["added_tokens"]}
        return backend, {content: (index, secret[index]) for index, content in self._control_tokens.items()}

    def _encode_by_role(self, prompt: Sequence[Message], rendered: str, place: str = "") -> NDArray[np.int64]:
        """Tokenize a rendered prompt with the control tokens of the template alone.

        Control strings inside messages are marked, so that those the rendering holds unmarked are the template's.
        """
        mark = uuid.uuid4().hex
        written: list[str] = []

        def hide(found: re.Match[str]) -> str:
            written.append(found[0])
            return f"{mark}{len(written) - 1:08d}"

        marked = self.render_text(
            [Message(message.role, self._control_pattern.sub(hide, message.content)) for message in prompt]
        )
        mark_pattern = re.compile(mark + r"(\d{8})")
        if mark_pattern.sub(lambda found: written[int(found[1])], marked) != rendered:
            found = "a message with a control token's string, which the template does not print as it is"
            raise InputError(self._template_place(place), found, "no " + " or ".join(sorted(set(written))))
        backend, secret_of = self._role_backend
        by_template: list[int] = []

        def show(found: re.Match[str]) -> str:
            if found[1]:
                return written[int(found[1])]
            index, secret = secret_of[found[0]]
            by_template.append(index)
            return secret

        text = re.sub(f"{mark_pattern.pattern}|{self._control_pattern.pattern}", show, marked)
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        if not np.array_equal(self._controls_of(ids), self._controls_of(np.array(by_template, dtype=np.int64))):
            found = "a message in which the tokenizer's model sees a control token"
            raise InputError(self._template_place(place), found, "control tokens that only their own strings make")
        return ids


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a fast tokenizer's content, whatever folder it was loaded from."""
    # In front stand truncation and padding: left there by whoever called the tokenizer last, no part of what it is.
    _, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
    return _fingerprint(content)


def _fingerprint(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
