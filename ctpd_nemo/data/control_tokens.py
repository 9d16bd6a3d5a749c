"""Control tokens: those that a template writes to tell turns apart, and that no message may write.

In a message their strings are text. These are the special tokens, and every other added token that the template can
print: role names of some tokenizers are not marked special.
"""

import functools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctpd_nemo.data.messages import Message, changed_texts, texts_in
from ctpd_nemo.data.turns import REASONING_TAGS
from ctpd_nemo.spans.text_backend import text_backend

Int64Array = NDArray[np.int64]

_REASONING = {tag for tags in REASONING_TAGS for tag in tags}


class RewrittenControlError(Exception):
    """A template that does not print a control token's string as it stands in a message."""

    def __init__(self, strings: Iterable[str]) -> None:
        super().__init__()
        self.strings = sorted(set(strings))


class HiddenControlError(Exception):
    """Text of a message in which the tokenizer's model sees a control token."""


class ControlTokens:
    """The control tokens of a tokenizer under a template, and prompts tokenized with the template's alone.

    Attributes:
        reader: The tokenizer of responses: in it the strings of control tokens are special, where they were not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, turns: str) -> None:
        """Look at the added tokens of a tokenizer.

        Args:
            tokenizer: It is only read.
            source: All that the template can print, its own text included.
            turns: What it writes around plain turns.
        """
        self._tokenizer = tokenizer
        roles = set(tokenizer.all_special_tokens)
        added = tokenizer.added_tokens_decoder
        special = {index: one.content for index, one in added.items() if one.special or one.content in roles}
        others = {index: one.content for index, one in added.items() if index not in special}
        # White space, which some tokenizers have among their added tokens, is every text's.
        others = {index: content for index, content in others.items() if content.strip() and content in source}
        # What tells turns apart is no assistant's to write. Tags inside its own turn are: reasoning, calls of tools.
        turn_tokens = {
            index: content for index, content in others.items() if content in turns and content not in _REASONING
        }
        self._content_of = special | others
        self._of_users = _pattern(self._content_of.values())
        self._of_assistants = _pattern((special | turn_tokens).values())
        self._marked = _marked_special(tokenizer, set(others.values()))
        self.reader = _marked_special(tokenizer, set(turn_tokens.values()))
        # A model may write its unknown token for any text. GPT-2's never does: there that name is one more of EOS's.
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._ids = np.array(sorted(set(self._content_of) - unknown), dtype=np.int64)

    @property
    def guarded(self) -> frozenset[str]:
        """Strings that are text in a response; tokenizers that are equal but for these read responses otherwise."""
        return frozenset(self.reader.all_special_tokens) | {
            one.content for one in self.reader.added_tokens_decoder.values() if one.special
        }

    def written_by(self, messages: Sequence[Message], fields: Mapping[str, Any]) -> bool:
        """Whether a message, or a field of its row, holds the string of a control token."""
        in_messages = (self._pattern_of(message).search(text) for message in messages for text in message.texts())
        return any(in_messages) or any(map(self._of_users.search, texts_in(fields)))

    def of(self, ids: Int64Array) -> Int64Array:
        """The control tokens among some tokens, in their order."""
        return ids[np.isin(ids, self._ids)]

    def encode(
        self,
        messages: Sequence[Message],
        fields: Mapping[str, Any],
        rendered: str,
        render: Callable[[Sequence[Message], Mapping[str, Any]], str],
    ) -> Int64Array:
        """Tokenize a rendered prompt with the control tokens of the template alone.

        Control strings inside messages are marked, so that those the rendering holds unmarked are the template's.

        Args:
            messages: The prompt.
            fields: What else of its row the template is given.
            rendered: Its text.
            render: What made that text of both.

        Raises:
            RewrittenControlError: The template changes a control token's string in a message.
            HiddenControlError: The tokenizer makes a control token of other text.
        """
        mark = uuid.uuid4().hex
        written: list[str] = []

        def hide(found: re.Match[str]) -> str:
            written.append(found[0])
            return f"{mark}{len(written) - 1:08d}"

        def hidden(pattern: re.Pattern[str]) -> Callable[[str], str]:
            return functools.partial(pattern.sub, hide)

        marked = render(
            [message.with_texts(hidden(self._pattern_of(message))) for message in messages],
            changed_texts(fields, hidden(self._of_users)),
        )
        mark_pattern = re.compile(mark + r"(\d{8})")
        if mark_pattern.sub(lambda found: written[int(found[1])], marked) != rendered:
            raise RewrittenControlError(written)
        backend, secret_of = self._role_backend
        by_template: list[int] = []

        def show(found: re.Match[str]) -> str:
            if found[1]:
                return written[int(found[1])]
            index, secret = secret_of[found[0]]
            by_template.append(index)
            return secret

        text = re.sub(f"{mark_pattern.pattern}|{self._of_users.pattern}", show, marked)
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        if not np.array_equal(self.of(ids), self.of(np.array(by_template, dtype=np.int64))):
            raise HiddenControlError
        return ids

    def _pattern_of(self, message: Message) -> re.Pattern[str]:
        return self._of_assistants if message.role == "assistant" else self._of_users

    @cached_property
    def _role_backend(self) -> tuple[Tokenizer, dict[str, tuple[int, str]]]:
        """A copy of the tokenizer whose control tokens have unguessable strings; by real string, id and that string.

        Its model cannot build a control token from text either, so a string becomes one only where we put it.
        """
        backend, spec = text_backend(self._marked)
        backend.encode_special_tokens = False
        secret = {token["id"]: token["content"] for token in spec["added_tokens"]}
        return backend, {content: (index, secret[index]) for index, content in self._content_of.items()}


def first_added_token(tokenizer: PreTrainedTokenizerBase, text: str) -> re.Match[str] | None:
    """The first added token in a text, special or not."""
    contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return _pattern(contents).search(text)


def _pattern(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    # The empty lookahead matches nowhere, as an empty list of tokens should.
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _marked_special(tokenizer: PreTrainedTokenizerBase, contents: set[str]) -> PreTrainedTokenizerBase:
    """A copy in which some added tokens are special; the tokenizer itself where there are none to mark."""
    if not contents:
        return tokenizer
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or token["content"] in contents
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **dict(tokenizer.special_tokens_map)
    )
    copy.name_or_path = tokenizer.name_or_path
    return copy
