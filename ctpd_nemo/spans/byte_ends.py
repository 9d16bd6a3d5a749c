"""Where each token ends, in bytes of the original text.

Two ways, tried in this order:

*Spelling.* Join the bytes that the ids stand for. If they give back the text (or the text behind one dummy space), the
end of a token is the running sum of byte lengths: exact by construction, inside characters too, whatever the
tokenizer's normalizer might have done. This needs no offsets and covers almost every text of every tokenizer.

*Tracing.* If they do not (a normalizer composed, folded or dropped something, or a token is unknown), ends come from
the tokenizer's character offsets: exact at characters. Inside a character an end is known only when the ids spell that
very character around the cut; else it is unknown. Text that no token covers belongs to the token that follows it.

Ends are kept in *closed* form: a token whose end is unknown carries the end of the first later token that has a known
one. So ends never decrease, the last is the length of the text, and a token is a place to cut exactly when the next
token's end is larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError
from ctpd_nemo.spans.pieces import PieceTable
from ctpd_nemo.spans.text_reader import text_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int64Array = NDArray[np.int64]

UNKNOWN = np.iinfo(np.int64).max


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
    # An empty text has no byte to cover: where a tokenizer makes a dummy prefix of nothing, that token is dropped.
    rows = [row if data else [] for row, data in zip(reader.ids(texts), encoded, strict=True)]
    first_token = list(accumulate(map(len, rows), initial=0))
    first_byte = list(accumulate(map(len, encoded), initial=0))
    ids = np.fromiter(chain.from_iterable(rows), np.int64, first_token[-1])

    ends, misspelled = _spelled_ends(ids, first_token, encoded, first_byte, reader.pieces)
    offsets = reader.offsets([texts[index] for index in misspelled]) if misspelled else []
    for index, text_offsets in zip(misspelled, offsets, strict=True):
        own = slice(first_token[index], first_token[index + 1])
        ends[own] = first_byte[index] + _traced_ends(encoded[index], ids[own], text_offsets, reader.pieces)
    return TokenEnds(ids, ends, first_token, first_byte)


def _spelled_ends(
    ids: Int64Array, first_token: list[int], encoded: Sequence[bytes], first_byte: list[int], pieces: PieceTable
) -> tuple[Int64Array, list[int]]:
    """Ends by the sum of byte lengths, and the texts that have tokens but are not spelled by them.

    The ends of those texts are meaningless and must be overwritten.
    """
    spelled, piece_bounds = pieces.spell(ids)
    begins = piece_bounds[first_token].tolist()
    shifts, misspelled, has_dummy_space = [], [], False
    for index, data in enumerate(encoded):
        shift = first_byte[index] - begins[index]
        read = spelled[begins[index] : begins[index + 1]]
        if read != data:
            if read == b" " + data:
                has_dummy_space = True
                shift -= 1
            elif first_token[index] < first_token[index + 1]:
                misspelled.append(index)
        shifts.append(shift)

    ends = piece_bounds[1:]
    if has_dummy_space or any(shifts):
        token_counts = np.diff(first_token)
        ends += np.repeat(shifts, token_counts)
        # A dummy space that is a token by itself ends where its text begins; it closes with the token that follows.
        nothing_yet = ends <= np.repeat(first_byte[:-1], token_counts)
        if nothing_yet.any():
            ends = _closed(np.where(nothing_yet, UNKNOWN, ends))
    return ends, misspelled


def _closed(ends: Int64Array) -> Int64Array:
    """Give every unknown end, and every end beyond a later one, the smallest end that follows it."""
    return np.minimum.accumulate(ends[::-1])[::-1]


def _traced_ends(data: bytes, ids: Int64Array, offsets: Sequence[tuple[int, int]], pieces: PieceTable) -> Int64Array:
    """Ends by character offsets, in closed form, for one text that has tokens.

    Args:
        data: the text in UTF-8, n_bytes > 0.
        ids: int64 [n], n > 0.
        offsets: the characters [start, stop) of the text that each token comes from, as the tokenizer traces them.
        pieces: the bytes of each id, to place ends inside a character.
    """
    start, stop = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2).T
    is_lead = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    char_begin = np.append(np.flatnonzero(is_lead), len(data))
    # `reach`: the characters covered so far end here. `back`: the tokens still to come begin here. Tokens that cover no
    # character (inserted by a normalizer) move neither.
    covers = stop > start
    reach = np.maximum.accumulate(np.where(covers, stop, 0))
    back = _closed(np.append(np.where(covers, start, len(char_begin) - 1)[1:], len(char_begin) - 1))

    ends = np.where(back >= reach, char_begin[reach], UNKNOWN)
    shares_a_character = np.flatnonzero(back == reach - 1)
    if len(shares_a_character):
        spelled, piece_bounds = pieces.spell(ids)
        _place_ends_inside_characters(ends, shares_a_character, reach - 1, char_begin, data, spelled, piece_bounds[1:])
    ends[ends == 0] = UNKNOWN
    ends[-1] = len(data)
    return _closed(ends)


def _place_ends_inside_characters(
    ends: Int64Array,
    tokens: Int64Array,
    last_char: Int64Array,
    char_begin: Int64Array,
    data: bytes,
    spelled: bytes,
    piece_ends: Int64Array,
) -> None:
    """Set ``ends`` of those ``tokens`` that end inside an unchanged character; the others stay as they are.

    Token i ends inside character ``last_char[i]`` of the text. Its end in the spelled bytes falls inside a spelled
    character too, or else the tokens split what a normalizer made of the character. If both characters are the same,
    and nothing else was made of it, the normalizer left it alone: the end is as many bytes into the one as into the
    other.
    """
    is_lead = np.append((np.frombuffer(spelled, dtype=np.uint8) & 0xC0) != 0x80, True)
    leads = np.flatnonzero(is_lead)
    is_whole = is_lead[piece_ends[tokens]]
    # Spelled characters that end here share their character of the text with the spelled character that follows.
    more_follows = set(piece_ends[tokens[is_whole]].tolist())
    tokens = tokens[~is_whole]
    following = np.searchsorted(leads, piece_ends[tokens])
    for token, lead in zip(tokens.tolist(), following.tolist(), strict=True):
        begin = int(leads[lead - 1]) if lead else 0
        char = last_char[token]
        char_bytes = data[char_begin[char] : char_begin[char + 1]]
        end = begin + len(char_bytes)
        if piece_ends[token] < end and end not in more_follows and spelled[begin:end] == char_bytes:
            ends[token] = char_begin[char] + piece_ends[token] - begin
