"""A tokenizer made ready for alignment, once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from ctpd_nemo.spans.pieces import model_letters, piece_table
from ctpd_nemo.spans.text_backend import description, fast_backend, text_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextReader:
    """The text-only copy of a tokenizer and the bytes of its pieces (see ``text_backend`` and ``pieces``)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backend, spec = text_backend(tokenizer)
        self.pieces = piece_table(self.backend, spec)
        self._letters = model_letters(spec)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, no special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """The characters [start, stop) of its text that each token comes from."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.offsets for encoding in encodings]

    def offsets_drift(self, text: str) -> bool:
        """Whether the model skips a letter of this text for want of a token.

        The ``tokenizers`` library counts the offsets of a word by the letters that the model kept, so behind a skipped
        letter they point too far to the left.
        """
        if self._letters is None:
            return False
        normalizer, pre_tokenizer = self.backend.normalizer, self.backend.pre_tokenizer
        normalized = normalizer.normalize_str(text) if normalizer else text
        words = pre_tokenizer.pre_tokenize_str(normalized) if pre_tokenizer else [(normalized, (0, 0))]
        return not all(self._letters.issuperset(word) for word, _ in words)


# With each tokenizer its backend, how many tokens that had, and the reader.
_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Tokenizer, int, TextReader]] = WeakKeyDictionary()
# The newest readers by what they were made of, for tokenizers that are loaded again: each stage of a recipe does so.
_NEWEST: OrderedDict[bytes, TextReader] = OrderedDict()
_KEPT = 2


def text_reader(tokenizer: PreTrainedTokenizerBase) -> TextReader:
    """Return the reader of a tokenizer, made on first use (about a second for 150,000 tokens) and kept with it.

    A process that forks workers can make it before the fork by aligning any text; the workers then share its memory.
    Adding tokens to the tokenizer makes a new reader; other changes to a tokenizer already in use are not seen.
    """
    backend = fast_backend(tokenizer)
    source, size, reader = _READERS.get(tokenizer, (None, 0, None))
    if reader is None or source is not backend or size != backend.get_vocab_size():
        reader = _made_once(tokenizer)
        _READERS[tokenizer] = backend, backend.get_vocab_size(), reader
    return reader


def _made_once(tokenizer: PreTrainedTokenizerBase) -> TextReader:
    """The reader, or that of an equal tokenizer."""
    content = [description(tokenizer), *sorted(tokenizer.all_special_tokens)]
    key = hashlib.sha256("\0".join(content).encode("utf-8", "surrogatepass")).digest()
    reader = _NEWEST.pop(key, None) or TextReader(tokenizer)
    _NEWEST[key] = reader
    while len(_NEWEST) > _KEPT:
        _NEWEST.popitem(last=False)
    return reader
