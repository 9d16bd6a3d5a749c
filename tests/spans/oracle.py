"""A slow, plain oracle for aligned spans, written from first principles and sharing no code with the package.

It works letter by letter. A *letter* is one character of the text as the model sees it (after the normalizer), with
the index of the character of the original text it comes from, or None for a dummy prefix that comes from nowhere.
Tokens are byte strings that spell the letters in order. A token's end follows from the letter and byte it stops at.

What it assumes: Unicode data of Python's ``unicodedata``; GPT-2's byte alphabet as ``transformers`` tabulates it; and
for NFC, the convention of the ``tokenizers`` library that a composed character comes from the first character it is
made of (so ``e`` + U+0301 comes from the ``e``, and U+0301 is covered by no token), and that after canonical ordering
the origins are counted off in the new order: the first part of each decomposed character moves on to the next
character of the text, its other parts stay at the one reached, and a composed character skips, right behind itself, as
many characters as it took in.
"""

import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Set
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

META = "\u2581"
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


class Letter(NamedTuple):
    char: str
    source: int | None


class Side(NamedTuple):
    ids: list[int]
    ends: list[int | None]


class Spans(NamedTuple):
    bounds: list[int]
    teacher_ids: list[int]
    student_ids: list[int]
    teacher_span: list[int]
    student_span: list[int]


def plain_letters(text: str) -> list[Letter]:
    return [Letter(char, index) for index, char in enumerate(text)]


def sentencepiece_letters(text: str) -> list[Letter]:
    """Llama-2: a meta symbol in front, and one for every space."""
    spaced = [Letter(META if char == " " else char, index) for index, char in enumerate(text)]
    return [Letter(META, None), *spaced] if text else []


def metaspace_letters(text: str) -> list[Letter]:
    """A meta symbol for every space, and one in front unless there is one."""
    letters = sentencepiece_letters(text)
    return letters[1:] if text[:1] in (" ", META) else letters


def nfc_letters(text: str) -> list[Letter]:
    """Canonical decomposition, ordering and composition, as Unicode Standard Annex 15 says, with sources."""
    # (part, whether it is the first part of its character)
    parts = [(part, k == 0) for char in text for k, part in enumerate(unicodedata.normalize("NFD", char))]
    index = 0
    while index < len(parts):
        stop = index
        while stop < len(parts) and unicodedata.combining(parts[stop][0]):
            stop += 1
        parts[index:stop] = sorted(parts[index:stop], key=lambda part: unicodedata.combining(part[0]))
        index = stop + 1
    composed: list[tuple[str, bool, int]] = []  # (character, whether it moves on, how many movers it took in)
    starter, last_class = None, -1
    for char, is_first in parts:
        combining_class = unicodedata.combining(char)
        if starter is not None and last_class < combining_class:
            base, base_is_first, taken = composed[starter]
            joined = unicodedata.normalize("NFC", base + char)
            if len(joined) == 1:
                composed[starter] = (joined, base_is_first, taken + is_first)
                continue
        if combining_class == 0:
            starter, last_class = len(composed), -1
        else:
            last_class = combining_class
        composed.append((char, is_first, 0))
    letters, source = [], -1
    for char, is_first, taken in composed:
        letters.append(Letter(char, source + is_first))
        source += is_first + taken
    assert "".join(letter.char for letter in letters) == unicodedata.normalize("NFC", text)
    return letters


def byte_level_pieces(tokenizer, ids: list[int]) -> list[bytes]:
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [
        added[index].encode() if index in added else bytes(BYTE_OF[char] for char in piece)
        for index, piece in zip(ids, pieces, strict=True)
    ]


def sentencepiece_pieces(tokenizer, ids: list[int]) -> list[bytes]:
    found = [(piece, re.fullmatch(r"<0x(..)>", piece)) for piece in tokenizer.convert_ids_to_tokens(ids)]
    return [bytes.fromhex(byte.group(1)) if byte else piece.encode() for piece, byte in found]


def wordpiece_pieces(tokenizer, ids: list[int]) -> list[bytes]:
    return [re.sub("^##", "", piece).encode() for piece in tokenizer.convert_ids_to_tokens(ids)]


def missing_bytes(tokenizer) -> set[int]:
    """Bytes that a byte-level tokenizer has no token for, and silently drops."""
    vocabulary = tokenizer.get_vocab()
    return {byte for char, byte in BYTE_OF.items() if char not in vocabulary}


def token_ends(
    text: str, letters: list[Letter], pieces: list[bytes], dropped: Callable[[str], bool], missing: Set[int]
) -> list[int | None]:
    """The byte of the text at which each token ends, None where it cannot be known; the last ends with the text.

    Letters for which ``dropped`` is true are in no token, nor are the ``missing`` bytes. The tokens spell all the rest,
    or this fails. Inside a letter an end is known if the letter is its character, and alone.
    """
    letters = [letter for letter in letters if not dropped(letter.char)]
    stream = [
        (at, used, byte)
        for at, letter in enumerate(letters)
        for used, byte in enumerate(letter.char.encode(), start=1)
        if byte not in missing
    ]
    assert b"".join(pieces) == bytes(byte for _, _, byte in stream)
    last_of = {letter.source: at for at, letter in enumerate(letters)}
    made_of = Counter(letter.source for letter in letters)
    char_begin = [0]
    for char in text:
        char_begin.append(char_begin[-1] + len(char.encode()))

    ends: list[int | None] = []
    position = 0
    for piece in pieces:
        position += len(piece)
        at, used, _ = stream[position - 1]
        char, source = letters[at]
        if source is None:
            ends.append(None)
        elif char == text[source] and made_of[source] == 1:
            ends.append(char_begin[source] + used)
        else:
            is_whole = position == len(stream) or stream[position][0] != at
            ends.append(char_begin[source + 1] if is_whole and at == last_of[source] else None)
    if ends:
        ends[-1] = char_begin[-1]
    return ends


def aligned(text: str, teacher: Side, student: Side) -> Spans:
    """Bounds are the ends that both sides know; a token lies in the span of the next known end of its side."""
    shared = set(teacher.ends) & set(student.ends) - {None}
    bounds = sorted(shared | {0, len(text.encode())})

    def spans(side: Side) -> list[int]:
        result, next_end = [], 0
        for end in reversed(side.ends):
            next_end = end or next_end
            result.append(bisect_left(bounds, next_end) - 1)
        return result[::-1]

    return Spans(bounds, teacher.ids, student.ids, spans(teacher), spans(student))
