"""A tokenizer made ready for alignment, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ctpd_nemo.spans.pieces import piece_table
from ctpd_nemo.spans.text_backend import text_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextReader:
    """The text-only copy of a tokenizer and the bytes of its pieces (see ``text_backend`` and ``pieces``)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend, spec = text_backend(tokenizer)
        self.pieces = piece_table(self.backend, spec)
        self._source = tokenizer.backend_tokenizer
        self._source_size = self._source.get_vocab_size()

    def is_current(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokenizer still has the backend this was made from, and as many tokens."""
        return tokenizer.backend_tokenizer is self._source and self._source.get_vocab_size() == self._source_size

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, no special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The characters [start, stop) of its text that each token comes from."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.offsets for encoding in encodings]


_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, TextReader] = WeakKeyDictionary()


def text_reader(tokenizer: PreTrainedTokenizerBase) -> TextReader:
    """Return the reader of a tokenizer, made on first use (about a second for 150,000 tokens) and kept with it.

    A process that forks workers can make it before the fork by aligning any text; the workers then share its memory.
    Adding tokens to the tokenizer makes a new reader; other changes to a tokenizer already in use are not seen.
    """
    reader = _READERS.get(tokenizer)
    if reader is None or not reader.is_current(tokenizer):
        reader = _READERS[tokenizer] = TextReader(tokenizer)
    return reader
