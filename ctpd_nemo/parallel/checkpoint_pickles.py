"""Pickles of a checkpoint, read by rules.

A pickle is a program: it may call what it names, and give any object any state. Of that language this reader runs the
part that writers of checkpoints use, and nothing else. Names stand for what the caller of the reader says they do,
never for what a module holds. What comes out has exact types: numbers, text, bytes, ``tuple``, ``list``, ``dict``,
``Record``, and what the caller's names make. Nothing in this project loads such bytes by other, freer means.
"""

import io
import pickle
import pickletools
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ctpd_nemo.errors import InputError

KNOWN = "a checkpoint of Megatron-Core's torch_dist format, which asks for nothing but its own records"

# Operations that a pickle may have; so many take two seconds and 200 MB, at most.
_MOST_OPERATIONS = 2_000_000
# ``torch.save`` writes 2, ``pickle.dump`` what is Python's default: 4, from 3.14 on 5.
_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
# Keys that hash in no time whatever they hold. Records do by what they are, not by what they say.
_KEYS = (str, int, float, bool, type(None))

Names = Mapping[tuple[str, str], Any]
"""What names of a pickle stand for, by module and name: a ``Call``, or a value."""


@dataclass(frozen=True)
class Call:
    """What a pickle may call; given the arguments, it makes a value of them, or raises an exception."""

    make: Callable[[tuple[Any, ...]], Any]


@dataclass(eq=False, repr=False)
class Record:
    """An object of a class that is known by its name only; what it holds is no part of how it is shown or compared.

    Attributes:
        kind: The name.
        arguments: What it is made of.
        state: What its attributes are, for its reader to judge; ``None`` until, and unless, the pickle says so.
    """

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None


def records(module: str, *names: str) -> dict[tuple[str, str], Call]:
    """Names of classes whose objects become records."""

    def call(kind: str) -> Call:
        return Call(lambda arguments: Record(kind, arguments))

    return {(module, name): call(name) for name in names}


def refusal(place: str, found: str) -> InputError:
    """The error over what no checkpoint holds."""
    return InputError(place, found, KNOWN)


def whole_numbers(value: Any, largest: int) -> tuple[int, ...]:
    """A tuple of whole numbers, and nothing else.

    Raises:
        ValueError: It is no tuple, or one is less than 0 or more than ``largest``.
    """
    if not isinstance(value, tuple) or any(type(number) is not int or not 0 <= number <= largest for number in value):
        raise ValueError(f"what are no numbers from 0 to {largest:,}")
    return value


def read_pickle(
    content: bytes | BinaryIO,
    place: str,
    names: Names,
    persistent: Call | None = None,
    most: int = _MOST_OPERATIONS,
) -> Any:
    """The value that a pickle describes.

    Args:
        content: The pickle with nothing behind it; or a file, which is read up to the end of the pickle.
        place: For errors.
        names: What it may ask for.
        persistent: Makes values of persistent ids, where there may be some.
        most: So many operations, at most.

    Raises:
        InputError: It asks for anything else, or is damaged.
    """
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    machine = _Machine(place, names, persistent)
    try:
        value = machine.run(stream, most)
    except InputError:
        raise
    # Of ``pickletools``, of stacks and memos that lack something, and of calls with other arguments.
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise refusal(place, f"a pickle that cannot be read ({error})") from error
    if stream is not content and stream.read(1):
        raise refusal(place, "a pickle with more behind its end")
    return value


class _Unknown:
    """Stands for names that mean nothing here."""


class _Machine:
    """The stack machine that pickles are programs of."""

    def __init__(self, place: str, names: Names, persistent: Call | None) -> None:
        self._place = place
        self._names = names
        self._persistent = persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO, most: int) -> Any:
        """Run a program up to its end."""
        first = stream.read(2)
        if first[:1] != pickle.PROTO or first[1:] not in _PROTOCOLS:
            raise self._refusal("a pickle of another protocol than 2 to 5")
        for _ in range(most):
            code = stream.read(1)
            if code not in _OPERATIONS:
                raise self._refusal(f"a pickle with the operation {_CODES[code].name if code in _CODES else code!r}")
            run, read = _OPERATIONS[code]
            if run is None:
                break
            if read is None:
                run(self)
            else:
                run(self, read(stream))
        else:
            raise self._refusal(f"a pickle of more than {most:,} operations")
        if self._below or len(self._stack) != 1:
            raise ValueError("it leaves more than one value")
        return self._stack[0]

    def _refusal(self, found: str) -> InputError:
        return refusal(self._place, found)

    # Values

    def _value(self, value: Any) -> None:
        self._stack.append(value)

    def _frame(self, _: int) -> None:
        """How much to read ahead."""

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    # Containers

    def _list(self) -> None:
        self._stack.append([])

    def _dict(self) -> None:
        self._stack.append({})

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _last(self, length: int) -> tuple[Any, ...]:
        at = len(self._stack) - length
        if at < 0:
            raise ValueError("it takes more values than there are")
        items = tuple(self._stack[at:])
        del self._stack[at:]
        return items

    def _tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _tuple_0(self) -> None:
        self._stack.append(())

    def _tuple_1(self) -> None:
        self._stack.append(self._last(1))

    def _tuple_2(self) -> None:
        self._stack.append(self._last(2))

    def _tuple_3(self) -> None:
        self._stack.append(self._last(3))

    def _append(self) -> None:
        self._into_list(self._last(1))

    def _appends(self) -> None:
        self._into_list(self._since_mark())

    def _into_list(self, items: Any) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise self._refusal(f"a pickle that appends to a {type(target).__name__}")
        target.extend(items)

    def _set_item(self) -> None:
        self._into_dict(self._last(2))

    def _set_items(self) -> None:
        self._into_dict(self._since_mark())

    def _into_dict(self, items: Any) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise self._refusal(f"a pickle that sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _KEYS and type(key) is not Record:
                raise self._refusal(f"a pickle with a {type(key).__name__} for a key")
            if key in target:
                raise self._refusal("a pickle with a key that is there twice")
            target[key] = value

    # Objects

    def _global(self, names: str) -> None:
        module, _, name = names.partition(" ")
        self._named(module, name)

    def _stack_global(self) -> None:
        module, name = self._last(2)
        if type(module) is not str or type(name) is not str:
            raise self._refusal("a pickle that asks for what is no name")
        self._named(module, name)

    def _named(self, module: str, name: str) -> None:
        value = self._names.get((module, name), _Unknown)
        if type(value) is Call or value is _Unknown:
            sys.audit("pickle.find_class", module, name)  # as Python's own readers do
        if value is _Unknown:
            raise self._refusal(f"a pickle that asks for {module}.{name}")
        self._stack.append(value)

    def _call(self) -> None:
        called, arguments = self._last(2)
        if type(called) is not Call or type(arguments) is not tuple:
            raise self._refusal(f"a pickle that calls a {type(called).__name__}")
        self._stack.append(called.make(arguments))

    def _build(self) -> None:
        (state,) = self._last(1)
        target = self._stack[-1]
        if type(target) is not Record:
            raise self._refusal(f"a pickle that gives attributes to a {type(target).__name__}")
        if target.state is not None:
            raise self._refusal(f"a pickle that gives attributes to a {target.kind} twice")
        target.state = state

    def _persistent_id(self) -> None:
        (identity,) = self._last(1)
        if self._persistent is None or type(identity) is not tuple:
            raise self._refusal("a pickle with persistent ids")
        self._stack.append(self._persistent.make(identity))

    # The memo

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _put(self, index: int) -> None:
        if index in self._memo:
            raise self._refusal("a pickle that remembers two values by one number")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])


_CODES = {operation.code.encode("latin-1"): operation for operation in pickletools.opcodes}
_RUN: dict[str, Callable[..., None] | None] = {
    "STOP": None,
    "FRAME": _Machine._frame,
    "NONE": _Machine._none,
    "NEWTRUE": _Machine._true,
    "NEWFALSE": _Machine._false,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine._value),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine._value),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine._value),
    "EMPTY_LIST": _Machine._list,
    "EMPTY_DICT": _Machine._dict,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "EMPTY_TUPLE": _Machine._tuple_0,
    "TUPLE1": _Machine._tuple_1,
    "TUPLE2": _Machine._tuple_2,
    "TUPLE3": _Machine._tuple_3,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
    "MEMOIZE": _Machine._memoize,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
}
# By code: what an operation does, and how its argument is read, where it has one.
_OPERATIONS = {
    code: (_RUN[operation.name], None if operation.arg is None else operation.arg.reader)
    for code, operation in _CODES.items()
    if operation.name in _RUN
}
