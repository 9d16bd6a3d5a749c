"""Bytes as something to look at: the invisible, what moves the text around it, and half characters are written out."""

import re
import unicodedata
from typing import NamedTuple

_HALVES = re.compile(r"[\udc80-\udcff]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ZWJ = "\u200d"
_SPACES = {" ": "\u00b7", "\t": "\u2192", "\n": "\u21b5"}


class Part(NamedTuple):
    """A run of a text that is shown in one way.

    Attributes:
        kind: ``text``: as it is. ``space``: a space, tab or line feed, as a sign for it. ``code``: a character that
            has no shape of its own, or would change the text around it, by its number. ``bytes``: bytes that are no
            whole character, in hexadecimal.
        text: What is shown.
    """

    kind: str
    text: str


def readable(data: bytes) -> list[Part]:
    """UTF-8 bytes in parts that can be shown one after the other; the bytes of cut characters are shown as bytes."""
    text = data.decode("utf-8", "surrogateescape")
    parts: list[Part] = []
    position = 0
    for half in _HALVES.finditer(text):
        parts += _letters(text[position : half.start()])
        parts.append(Part("bytes", half[0].encode("utf-8", "surrogateescape").hex(" ").upper()))
        position = half.end()
    return parts + _letters(text[position:])


def plain(parts: list[Part]) -> str:
    """The same in one line of plain text."""
    return "".join(f"[{part.text}]" if part.kind in ("code", "bytes") else part.text for part in parts)


def without_surrogates(text: str) -> tuple[str, int]:
    """The text with U+FFFD for every lone surrogate, which no UTF-8 can hold; and how many there were."""
    return _SURROGATE.subn("\ufffd", text)


def _letters(text: str) -> list[Part]:
    parts: list[Part] = []
    for index, char in enumerate(text):
        before, after = text[index - 1 : index], text[index + 1 : index + 2]
        part = _letter(char, before, after)
        if parts and parts[-1].kind == part.kind == "text":
            parts[-1] = Part("text", parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def _letter(char: str, before: str, after: str) -> Part:
    if char in _SPACES:
        return Part("space", _SPACES[char])
    category = unicodedata.category(char)
    if char == _ZWJ and after and _is_symbol(before):
        return Part("text", char)
    if category[0] in "CZ":
        return Part("code", f"U+{ord(char):04X}")
    if category[0] == "M" and not _can_carry(before):
        # A variation selector has no shape even on a dotted circle.
        is_selector = 0xFE00 <= ord(char) <= 0xFE0F
        return Part("code", f"U+{ord(char):04X}") if is_selector else Part("text", "\u25cc" + char)
    return Part("text", char)


def _is_symbol(char: str) -> bool:
    """Whether a joiner behind this character joins: a sign, or a letter or mark beyond the European scripts."""
    return bool(char) and (unicodedata.category(char)[0] == "S" or ord(char) >= 0x0900)


def _can_carry(char: str) -> bool:
    """Whether a combining mark behind this character has something to stand on."""
    return bool(char) and unicodedata.category(char)[0] not in "CZ"
