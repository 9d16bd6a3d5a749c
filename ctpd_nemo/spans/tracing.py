"""Where tokens end in a text that they do not spell, by the tokenizer's character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.spans.pieces import PieceTable

Int64Array = NDArray[np.int64]

UNKNOWN = np.iinfo(np.int64).max


def closed(ends: Int64Array) -> Int64Array:
    """Give every unknown end, and every end beyond a later one, the smallest end that follows it."""
    return np.minimum.accumulate(ends[::-1])[::-1]


def traced_ends(data: bytes, ids: Int64Array, offsets: Sequence[tuple[int, int]], pieces: PieceTable) -> Int64Array:
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
    back = closed(np.append(np.where(covers, start, len(char_begin) - 1)[1:], len(char_begin) - 1))

    ends = np.where(back >= reach, char_begin[reach], UNKNOWN)
    shares_a_character = np.flatnonzero(back == reach - 1)
    if len(shares_a_character):
        spelled, piece_bounds = pieces.spell(ids)
        _place_ends_inside_characters(ends, shares_a_character, reach - 1, char_begin, data, spelled, piece_bounds[1:])
    ends[ends == 0] = UNKNOWN
    ends[-1] = len(data)
    return closed(ends)


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
    # The spelled characters before and after these places were made of one character of the text. A dummy space does
    # not count: it takes nothing from the first character.
    splits = set(piece_ends[tokens[is_whole]].tolist())
    if spelled.startswith(b" "):
        splits.discard(1)
    tokens = tokens[~is_whole]
    following = np.searchsorted(leads, piece_ends[tokens])
    for token, lead in zip(tokens.tolist(), following.tolist(), strict=True):
        begin = int(leads[lead - 1]) if lead else 0
        char = last_char[token]
        char_bytes = data[char_begin[char] : char_begin[char + 1]]
        end = begin + len(char_bytes)
        if piece_ends[token] < end and spelled[begin:end] == char_bytes and splits.isdisjoint((begin, end)):
            ends[token] = char_begin[char] + piece_ends[token] - begin
