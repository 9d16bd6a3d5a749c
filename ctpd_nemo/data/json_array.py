"""Where the rows of a JSON value lie in a file, found without parsing them and in little memory."""

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

from ctpd_nemo.errors import InputError

_BLOCK = 2**20
_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},:]'), re.compile(rb'["\\]')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
_LONGEST_KEY = 1000
# An object with one of these is a row, whatever lists it has.
_OF_ROWS = ("prompt", "chosen", "rejected", "completions")

Bounds = list[tuple[int, int]]


class Mark(NamedTuple):
    """A byte that gives JSON its structure: which, where, and in how many lists and objects, its own included."""

    byte: bytes
    at: int
    depth: int


def row_bounds(file: BinaryIO, place: str) -> Bounds | None:
    """First byte and end of each row in a file of one JSON value: the elements of a list, or of the list in an object.

    An object that is a row, or has no list, is the only row. What lies between the bounds need not be JSON.

    Args:
        file: It is read from its beginning.
        place: Its name.

    Returns:
        ``None`` where the file begins with no list and no object, or goes on behind an object: as JSON Lines do.

    Raises:
        InputError: The value does not end, goes on behind its list, or has several lists that may be meant.
    """
    begin = _first_byte(file)
    opening = os.pread(file.fileno(), 1, begin)
    if opening not in (b"[", b"{"):
        return None
    keys, lists, end = _outline(file, begin, opening)
    if end is None:
        raise InputError(place, "JSON that does not end, as if the file were cut", "a whole file")
    if not _is_blank(file, end, os.fstat(file.fileno()).st_size):
        if opening == b"{":
            return None
        raise InputError(place, f"text behind the list, at byte {end}", "one list of rows")
    if opening == b"[":
        return lists[0][1]
    of_objects = [
        name for name, bounds in lists if bounds and os.pread(file.fileno(), 1, _text_from(file, bounds[0])) == b"{"
    ]
    if not of_objects or any(key in _OF_ROWS for key in keys):
        return [(begin, end)]
    if len(of_objects) > 1:
        found = f"an object with lists of objects under {' and '.join(map(repr, of_objects[:3]))}"
        raise InputError(place, found, "a list of rows, or an object with one list")
    return dict(lists)[of_objects[0]]


def _outline(file: BinaryIO, begin: int, opening: bytes) -> tuple[list[str], list[tuple[str, Bounds]], int | None]:
    """Keys of an object, elements of its lists (of a list itself, without a key), and its end where there is one."""
    level = 1 if opening == b"[" else 2
    keys: list[str] = []
    lists: list[tuple[str, Bounds]] = []
    within: Bounds | None = None
    start = key_at = begin
    for byte, at, depth in _marks(file, begin, level):
        if depth < level:
            if byte == b'"':
                key_at = at
            elif byte == b":":
                keys.append(_key(file, key_at, at))
            elif byte in (b"}", b"]"):
                return keys, lists, at + 1
        elif byte in (b"[", b"{"):
            within = [] if byte == b"[" else None
            start = at + 1
            if within is not None:
                lists.append((keys[-1] if keys else "", within))
        elif byte in (b",", b"]") and within is not None:
            if byte == b"," or within or not _is_blank(file, start, at):
                within.append((start, at))
            start = at + 1
            if byte == b"]" and level == 1:
                return keys, lists, at + 1
    return keys, lists, None


def _marks(file: BinaryIO, begin: int, deepest: int) -> Iterator[Mark]:
    """The marks of the value at ``begin``, of strings only the beginning, down to a depth."""
    depth, in_string, passed_over = 0, False, 0
    file.seek(begin)
    position = begin
    for block in iter(partial(file.read, _BLOCK), b""):
        at, passed_over = passed_over, 0
        while found := (_INSIDE if in_string else _OUTSIDE).search(block, at):
            byte, at = found[0], found.end()
            if byte == b"\\":
                # What is escaped may be the first byte of the next block.
                at += 1
                passed_over = max(0, at - len(block))
            elif byte == b'"':
                if not in_string and depth <= deepest:
                    yield Mark(byte, position + found.start(), depth)
                in_string = not in_string
            else:
                depth += byte in b"[{"
                if depth <= deepest:
                    yield Mark(byte, position + found.start(), depth)
                depth -= byte in b"]}"
        position += len(block)


def _begins_object(file: BinaryIO, bounds: tuple[int, int]) -> bool:
    return os.pread(file.fileno(), 1, _text_from(file, bounds)) == b"{"


def _key(file: BinaryIO, begin: int, end: int) -> str:
    text = os.pread(file.fileno(), min(end - begin, _LONGEST_KEY), begin)
    try:
        return str(json.loads(text))
    except ValueError:
        return text.decode(errors="replace")


def _first_byte(file: BinaryIO) -> int:
    """Where text begins, behind a byte order mark and white space."""
    mark = len(_BYTE_ORDER_MARK) if os.pread(file.fileno(), 3, 0) == _BYTE_ORDER_MARK else 0
    return _text_from(file, (mark, os.fstat(file.fileno()).st_size))


def _text_from(file: BinaryIO, bounds: tuple[int, int]) -> int:
    """The first byte within bounds that is no white space; the end where there is none."""
    begin, end = bounds
    while begin < end:
        block = os.pread(file.fileno(), min(_BLOCK, end - begin), begin)
        text = block.lstrip(_WHITE)
        if text or not block:
            return begin + len(block) - len(text)
        begin += len(block)
    return end


def _is_blank(file: BinaryIO, begin: int, end: int) -> bool:
    return _text_from(file, (begin, end)) >= end
