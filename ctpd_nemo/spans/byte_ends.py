"""Where each token ends, in bytes of the original text.

Three ways, tried in this order:

*Spelling.* Join the bytes that the ids stand for. If they give back the text (or the text behind one dummy space), the
end of a token is the running sum of byte lengths: exact by construction, inside characters too, whatever the
tokenizer's normalizer might have done. This needs no offsets and covers almost every text of every tokenizer.

*Spelling with gaps.* A byte-level vocabulary may lack a byte (StarCoder2's lacks 0xF1) and drop it without a word. If
the ids spell the text without those bytes, each token ends behind its last byte.

*Tracing.* Else a normalizer composed, folded or dropped something, or a token is unknown: ends come from the
tokenizer's character offsets (see ``tracing``), exact at characters, and inside them where the character is untouched.

Text that no token covers belongs to the token that follows it.

Ends are kept in *closed* form: a token whose end is unknown carries the end of the first later token that has a known
one. So ends never decrease, the last is the length of the text, and a token is a place to cut exactly when the next
token's end is larger.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np

from ctpd_nemo.errors import InputError
from ctpd_nemo.spans.pieces import PieceTable
from ctpd_nemo.spans.text_reader import TextReader, text_reader
from ctpd_nemo.spans.tracing import UNKNOWN, Int64Array, closed, traced_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenEnds:
    """The tokens of a batch of texts on one byte axis: the texts' UTF-8 bytes, joined.

    Attributes:
        ids: int64 [n_tokens], the token ids of all texts, one text after the other, no special tokens.
        ends: int64 [n_tokens], the end of each token on the byte axis, in closed form (see the module docstring).
        first_token: n_texts + 1 positions in ``ids`` at which each text's tokens begin; the last is n_tokens.
        first_byte: n_texts + 1 positions on the byte axis at which each text begins; the last is its length.
    """

    ids: Int64Array
    ends: Int64Array
    first_token: list[int]
    first_byte: list[int]


def token_byte_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Int64Array, Int64Array]:
    """Tokenize one text and say where each token ends.

    Args:
        text: any string that UTF-8 can encode.
        tokenizer: a Hugging Face fast tokenizer.

    Returns:
        Token ids, int64 [n], no special tokens; and the byte of ``text.encode("utf-8")`` at which each token ends,
        int64 [n], or -1 where the text cannot be cut after that token.

    Raises:
        InputError: the text is not encodable in UTF-8, or the tokenizer is not a fast one.
    """
    side = batch_token_ends([text], utf8([text]), tokenizer)
    can_cut = np.diff(side.ends, append=UNKNOWN) > 0
    return side.ids, np.where(can_cut, side.ends, -1)


def utf8(texts: Sequence[str]) -> list[bytes]:
    """Encode texts, or raise InputError that names the text and the character that UTF-8 cannot encode."""
    if isinstance(texts, str):
        raise InputError("texts", "a single string", "a sequence of strings")
    encoded = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {index}", f"a {type(text).__name__}", "a string")
        try:
            encoded.append(text.encode())
        except UnicodeEncodeError as error:
            surrogate = f"a lone surrogate U+{ord(text[error.start]):04X}"
            raise InputError(
                f"text {index}, character {error.start}", surrogate, "text that UTF-8 can encode"
            ) from None
    return encoded


def batch_token_ends(texts: Sequence[str], encoded: Sequence[bytes], tokenizer: PreTrainedTokenizerBase) -> TokenEnds:
    """Tokenize a batch of texts and place every token's end on the byte axis of the batch.

    Args:
        texts: n_texts strings.
        encoded: their UTF-8 bytes, see ``utf8``.
        tokenizer: a Hugging Face fast tokenizer.
    """
    reader = text_reader(tokenizer)
    return place_ends(texts, encoded, reader.ids(texts), reader)


def place_ends(
    texts: Sequence[str], encoded: Sequence[bytes], rows: Sequence[list[int]], reader: TextReader
) -> TokenEnds:
    """Place the ends of tokens that are already there: ``rows`` are the ids that ``reader`` gives for ``texts``."""
    # An empty text has no byte to cover: where a tokenizer makes a dummy prefix of nothing, that token is dropped.
    rows = [row if data else [] for row, data in zip(rows, encoded, strict=True)]
    first_token = list(accumulate(map(len, rows), initial=0))
    first_byte = list(accumulate(map(len, encoded), initial=0))
    # array("I") reads a list of Python integers twice as fast as NumPy does.
    ids = np.frombuffer(array("I", list(chain.from_iterable(rows))), dtype=np.uintc).astype(np.int64)

    ends, misspelled = _spelled_ends(ids, first_token, encoded, first_byte, reader.pieces)
    offsets = reader.offsets([texts[index] for index in misspelled]) if misspelled else []
    for index, text_offsets in zip(misspelled, offsets, strict=True):
        data, own = encoded[index], slice(first_token[index], first_token[index + 1])
        own_ends = _gapped_ends(data, ids[own], reader.pieces)
        if own_ends is None and reader.offsets_drift(texts[index]):
            own_ends = np.full(own.stop - own.start, len(data))
        elif own_ends is None:
            own_ends = traced_ends(data, ids[own], text_offsets, reader.pieces)
        ends[own] = first_byte[index] + own_ends
    return TokenEnds(ids, ends, first_token, first_byte)


def _spelled_ends(
    ids: Int64Array, first_token: list[int], encoded: Sequence[bytes], first_byte: list[int], pieces: PieceTable
) -> tuple[Int64Array, list[int]]:
    """Ends by the sum of byte lengths, and the texts that have tokens but are not spelled by them.

    The ends of those texts are meaningless and must be overwritten.
    """
    spelled, piece_bounds = pieces.spell(ids)
    begins = piece_bounds[first_token].tolist()
    shifts, prefixed, misspelled = [], [], []
    for index, data in enumerate(encoded):
        shift = first_byte[index] - begins[index]
        read = spelled[begins[index] : begins[index + 1]]
        if read != data:
            if read == b" " + data:
                prefixed.append(index)
                shift -= 1
            elif first_token[index] < first_token[index + 1]:
                misspelled.append(index)
        shifts.append(shift)

    ends = piece_bounds[1:]
    if any(shifts):
        ends += np.repeat(shifts, np.diff(first_token))
    if prefixed:
        # A dummy space that is a token by itself ends where its text begins; it closes with the token that follows.
        first = np.array(first_token)[prefixed]
        alone = first[ends[first] == np.array(first_byte)[prefixed]]
        ends[alone] = ends[alone + 1]
    return ends, misspelled


def _gapped_ends(data: bytes, ids: Int64Array, pieces: PieceTable) -> Int64Array | None:
    """Ends within one text if ``ids`` spell it but for the bytes that have no token, else None."""
    if not pieces.dropped_bytes:
        return None
    spelled, piece_bounds = pieces.spell(ids)
    kept = data.translate(None, pieces.dropped_bytes)
    if spelled not in (kept, b" " + kept):
        return None
    is_kept = ~np.isin(np.frombuffer(data, dtype=np.uint8), list(pieces.dropped_bytes))
    end_of_kept = np.append(UNKNOWN, np.flatnonzero(is_kept) + 1)
    dummy_space = len(spelled) - len(kept)
    ends = end_of_kept[np.maximum(piece_bounds[1:] - dummy_space, 0)]
    ends[-1] = len(data)
    return closed(ends)
