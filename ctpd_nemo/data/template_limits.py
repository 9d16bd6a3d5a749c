"""What one rendering of a chat template may make: a ledger, and a look at operands before they meet.

No value may be larger than a bound, shared parts counted as often as they would be printed. So no single operation of
Python takes long, and all of them together have a budget. Operations whose result can be far larger than what goes in
are estimated before they are done.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

# Real templates write messages once, and make each a few times on the way.
_MOST_TEXT, _MOST_COPIES = 1_000_000, 16
_MOST_MADE, _MOST_MADE_COPIES = 64_000_000, 256
# A step (a turn of a loop, a call, a comparison) costs as much as so many characters,
_STEP = 128
# and an item of a list or mapping as so many.
_ITEM = 8
_MOST_BITS = 4096
_MOST_DEPTH = 64
_MOST_KEYS = 10_000
# What takes the time of a product: characters to strip, and searches from the right.
_MOST_STRIPPED, _MOST_SEARCHED = 1000, 10**8
# Characters that one may become where it is escaped for HTML.
_ESCAPED = 5
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, *_VIEWS)
_MEASURED = (dict, *_CONTAINERS)
_UNORDERED = (set, frozenset, *_VIEWS)
_PLAIN = (int, float, type(None), range, Undefined)
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")
_LONG_NUMBER = re.compile(r"\d{5}")


class TemplateFaultError(Exception):
    """A template asks for more than rendering takes, or writes what its messages alone do not decide."""


class Ledger:
    """What one rendering may still make.

    Args:
        given: Characters and items of what is rendered.
        seconds: CPU time of the thread.

    Attributes:
        most: Characters and items of one value.
    """

    def __init__(self, given: int, seconds: float) -> None:
        self.most = _MOST_TEXT + _MOST_COPIES * given
        self._given = given
        self._left = _MOST_MADE + _MOST_MADE_COPIES * given
        self._seconds = seconds
        self._deadline = time.thread_time() + seconds
        self._steps = 0

    def charge(self, size: int) -> None:
        """Count a value of so many characters or items; 0 for what makes none.

        Raises:
            TemplateFaultError: It is too large, or the budget is spent.
        """
        if size > self.most:
            self.expect(size)
        self._left -= size + _STEP
        self._steps += 1
        if self._left < 0:
            raise TemplateFaultError(f"no end after {self._steps:,} steps")
        if not self._steps % 64 and time.thread_time() > self._deadline:
            raise TemplateFaultError(f"no end after {self._seconds:g} s")

    def expect(self, size: int) -> None:
        """Stop where a value that is about to be made is too large."""
        if size > self.most:
            raise TemplateFaultError(f"a value of more than {self.most:,} characters where {self._given:,} are given")


ledger: ContextVar[Ledger] = ContextVar("ledger")


def measure(value: Any, most: float) -> int:
    """Characters and items of a value that is written the same every time, its parts as often as it holds them.

    Raises:
        TemplateFaultError: There are more than ``most``, it is nested too deep, or it has a part whose text is no
            function of its content.
    """
    size, left = 0, [(value, 0)]
    while left:
        item, depth = left.pop()
        size += _ITEM
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, _CONTAINERS):
            left += [(part, depth + 1) for part in item]
        elif isinstance(item, int):
            size += check_number(item) // 3
        elif not isinstance(item, _PLAIN):
            raise TemplateFaultError(f"a {type(item).__name__} where text, numbers, lists and mappings can stand")
        if size + _ITEM * len(left) > most:
            raise TemplateFaultError(f"a value of more than {int(most):,} characters and items")
        if depth > _MOST_DEPTH:
            raise TemplateFaultError(f"values nested more than {_MOST_DEPTH} deep")
    return size


def check_number(value: int) -> int:
    """The bits of a number.

    Raises:
        TemplateFaultError: It has more than anyone computes with.
    """
    bits = value.bit_length()
    if bits > _MOST_BITS:
        raise TemplateFaultError(f"a number of {bits:,} bits")
    return bits


def step() -> str:
    """Count a step of the template; the empty text."""
    ledger.get().charge(0)
    return ""


def made(value: Any) -> Any:
    """Count a value that was just made; it is returned, a generator as one whose values are steps."""
    at = ledger.get()
    if isinstance(value, str):
        at.charge(len(value))
    elif isinstance(value, GeneratorType):
        return steps(value)
    elif isinstance(value, _MEASURED):
        at.charge(_ITEM * len(value))
        measure(value, at.most)
    else:
        if isinstance(value, int):
            check_number(value)
        at.charge(0)
    return value


def steps(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each a step."""
    for value in values:
        step()
        yield value


def whole(value: Any) -> Any:
    """A generator as a list, for operations that go through all of it at once; anything else as it is."""
    return made(list(value)) if isinstance(value, GeneratorType) else value


def text(value: Any) -> str:
    """``str(value)``, counted.

    Raises:
        TemplateFaultError: It is too long, or has a part whose text is no function of its content.
    """
    if not isinstance(value, str):
        measure(value, ledger.get().most)
        value = str(value)
    ledger.get().charge(len(value))
    return value


def joined(parts: Iterable[str]) -> str:
    """``"".join(parts)``, its length known before."""
    parts = list(parts)
    ledger.get().charge(sum(map(len, parts)))
    return "".join(parts)


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Look at the operands of ``+``, ``-``, ``*``, ``/``, ``//``, ``%`` and ``**`` before they meet.

    Raises:
        TemplateFaultError: The result would be too large, or in no order.
    """
    for value in (left, right):
        if isinstance(value, int):
            check_number(value)
        elif isinstance(value, _UNORDERED):
            raise TemplateFaultError(f"an operation on {type(value).__name__}, which gives no order")
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > _MOST_BITS:
            raise TemplateFaultError(f"a power of {left.bit_length() * right:,} bits")
    elif operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                ledger.get().expect(measure(many, ledger.get().most) * times)
    elif operator == "%" and isinstance(left, str):
        check_conversions(left, right)


def check_conversions(template: str, values: Any) -> None:
    """Look at what ``template % values`` would make.

    Raises:
        TemplateFaultError: It would be too large.
    """
    if isinstance(template, Markup):
        raise TemplateFaultError("% on text that is marked safe")
    widths = [number for found in _CONVERSION.finditer(template) for number in found.groups() if number]
    if any(number == "*" or len(number) > 4 for number in widths):
        raise TemplateFaultError("a conversion of more than 9,999 characters")
    parts = values if isinstance(values, tuple) else values.values() if isinstance(values, dict) else (values,)
    largest = max((measure(part, ledger.get().most) for part in parts), default=0)
    ledger.get().expect(len(template) + sum(map(int, widths)) + largest * template.count("%"))


def check_format(spec: str) -> None:
    """Stop where a format of ``str.format`` asks for a width of five digits."""
    if _LONG_NUMBER.search(spec):
        raise TemplateFaultError("a format of more than 9,999 characters")


def check_method(of: str, name: str, given: tuple[Any, ...]) -> None:
    """Look at the arguments of a method of a text before it is called.

    Raises:
        TemplateFaultError: It would take too long, or make too much.
    """
    times = _ESCAPED if isinstance(of, Markup) else 1
    if name in ("center", "ljust", "rjust", "zfill"):
        check_widths(given)
    elif name == "join" and given:
        check_join(of, given[0], times)
    elif name == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        check_replace(of, given[0], given[1], times)
    elif name in ("strip", "lstrip", "rstrip"):
        check_stripped(given)
    elif name in ("rfind", "rindex", "rsplit", "rpartition"):
        longest = max((len(part) for part in given if isinstance(part, str)), default=0)
        if longest > 1 and longest * len(of) > _MOST_SEARCHED:
            raise TemplateFaultError(f"{name} of {longest:,} characters in {len(of):,}")


def check_widths(values: Iterable[Any]) -> None:
    """Stop where a number that becomes so many characters is larger than a text may be."""
    for value in values:
        if isinstance(value, int):
            ledger.get().expect(value)


def check_join(separator: str, values: Any, times: int = 1) -> None:
    """Stop where joining makes a text too long; each character of ``values`` may become ``times`` as many."""
    count = len(values) if hasattr(values, "__len__") else 0
    ledger.get().expect(len(separator) * count + times * measure(values, ledger.get().most))


def check_replace(of: str, old: str, new: str, times: int = 1) -> None:
    """Stop where replacing makes a text too long; each character of ``new`` may become ``times`` as many."""
    ledger.get().expect(len(of) + of.count(old) * len(new) * times)


def check_stripped(values: Iterable[Any]) -> None:
    """Stop where more characters are to be stripped than anyone names."""
    if any(isinstance(value, str) and len(value) > _MOST_STRIPPED for value in values):
        raise TemplateFaultError(f"more than {_MOST_STRIPPED:,} characters to strip")


def check_keys(value: Any) -> None:
    """Stop where a table would have more entries than anyone's: those that collide take the square of the time."""
    if hasattr(value, "__len__") and len(value) > _MOST_KEYS:
        raise TemplateFaultError(f"a table of more than {_MOST_KEYS:,} entries")
