"""Objects that do something where a pickle of them is loaded, and programs that no pickler writes."""

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROTOCOLS = range(6)


class Calls:
    """Has a pickle call something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Sets:
    """Has a pickle give an object a state, by BUILD."""

    def __init__(self, made: Any, state: Any) -> None:
        self.build = *made, state

    def __reduce__(self) -> Any:
        return self.build


def saved(content: Any, protocol: int = 2) -> bytes:
    """An archive of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def saved_before_archives(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def make_directory(canary: Path) -> Any:
    return Calls(os.mkdir, str(canary))


def run_a_shell(canary: Path) -> Any:
    return Calls(os.system, f"mkdir {canary}")


def start_a_process(canary: Path) -> Any:
    return Calls(subprocess.Popen, ["mkdir", str(canary)])


def evaluate(canary: Path) -> Any:
    return Calls(eval, f"__import__('os').mkdir({str(canary)!r})")


def execute(canary: Path) -> Any:
    return Calls(exec, f"import os; os.mkdir({str(canary)!r})")


def write_a_file(canary: Path) -> Any:
    return Calls(builtins.open, str(canary), "w")


def call_a_host(canary: Path) -> Any:
    return Calls(socket.create_connection, ("127.0.0.1", 9), 0.1)


def import_what_lies_there(canary: Path) -> Any:
    return Calls(importlib.import_module, "planted")


def run_what_lies_there(canary: Path) -> Any:
    return Calls(runpy.run_path, str(canary.parent / "planted.py"))


def load_a_nested_pickle(canary: Path) -> Any:
    return Calls(pickle.loads, pickle.dumps(make_directory(canary)))


def load_a_nested_archive(canary: Path) -> Any:
    return Calls(functools.partial(torch.load, weights_only=False), Calls(io.BytesIO, saved(make_directory(canary))))


def load_a_nested_storage(canary: Path) -> Any:
    return Calls(torch.storage._load_from_bytes, saved_before_archives(make_directory(canary)))


def make_an_attribute_call(canary: Path) -> Any:
    return Calls(operator.methodcaller("mkdir"), canary)


PAYLOADS = [
    make_directory,
    run_a_shell,
    start_a_process,
    evaluate,
    execute,
    write_a_file,
    call_a_host,
    import_what_lies_there,
    run_what_lies_there,
    load_a_nested_pickle,
    load_a_nested_archive,
    load_a_nested_storage,
    make_an_attribute_call,
]


# Programs, by hand

# A module that checkpoints name, and that has others for attributes.
_WITH_OS = "torch.distributed.checkpoint.filesystem"


def text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def program(*parts: bytes, protocol: int = 4) -> bytes:
    """A whole pickle."""
    return pickle.PROTO + bytes([protocol]) + b"".join(parts) + pickle.STOP


def mkdir(canary: Path) -> bytes:
    """The arguments of a call that makes the canary."""
    return text(str(canary)) + pickle.TUPLE1


def programs(canary: Path) -> dict[str, tuple[bytes, bool]]:
    """Each with whether Python's own reader runs it to the canary."""
    call = named("os", "mkdir") + mkdir(canary) + pickle.REDUCE
    old = f"cos\nmkdir\n(V{canary}\ntR."
    return {
        "of no protocol": (old.encode(), True),
        "INST": (program(pickle.MARK, text(str(canary)), pickle.INST + b"os\nmkdir\n"), True),
        "OBJ": (program(pickle.MARK, named("os", "mkdir"), text(str(canary)), pickle.OBJ), True),
        "NEWOBJ": (program(named("planted", "Made"), mkdir(canary), pickle.NEWOBJ), True),
        "NEWOBJ_EX": (program(named("planted", "Made"), mkdir(canary), pickle.EMPTY_DICT, pickle.NEWOBJ_EX), True),
        "EXT1": (program(pickle.EXT1 + b"\x07", mkdir(canary), pickle.REDUCE), True),
        "EXT2": (program(pickle.EXT2 + b"\x07\0", mkdir(canary), pickle.REDUCE), True),
        "EXT4": (program(pickle.EXT4 + b"\x07\0\0\0", mkdir(canary), pickle.REDUCE), True),
        "a state that is called": (
            program(named("planted", "Built"), pickle.EMPTY_TUPLE, pickle.NEWOBJ, text(str(canary)), pickle.BUILD),
            True,
        ),
        "a name with dots": (
            program(
                *(text(_WITH_OS), text("os.mkdir"), pickle.STACK_GLOBAL),
                *(mkdir(canary), pickle.REDUCE),
            ),
            True,
        ),
        "a call that is taken away": (program(call, pickle.POP, pickle.NONE), True),
        "a call that is taken away with others": (program(pickle.MARK, call, pickle.POP_MARK, pickle.NONE), True),
        "a value that is remembered over another": (
            program(
                *(pickle.EMPTY_DICT, pickle.BINPUT + b"\0"),
                *(named("os", "mkdir"), pickle.BINPUT + b"\0", pickle.BINGET + b"\0"),
                *(mkdir(canary), pickle.REDUCE),
            ),
            True,
        ),
        "a pickle behind another's end": (program(pickle.NONE) + program(call), False),
        "a memo of four billion": (program(pickle.NONE, pickle.LONG_BINPUT + b"\xff\xff\xff\xef"), False),
        "a persistent id": (program(text("a"), pickle.BINPERSID), False),
        "a persistent id of protocol 0": (b"Pa\n.", False),
        "a text of exabytes": (program(pickle.BINUNICODE8 + struct.pack("<Q", 2**62) + b"a"), False),
        "bytes of exabytes": (program(pickle.BINBYTES8 + struct.pack("<Q", 2**62) + b"a"), False),
        "a bytearray of exabytes": (program(pickle.BYTEARRAY8 + struct.pack("<Q", 2**62), protocol=5), False),
        "a buffer from outside": (program(pickle.NEXT_BUFFER, protocol=5), False),
        "a frame of exabytes": (program(pickle.FRAME + struct.pack("<Q", 2**62), pickle.NONE), False),
        "a number of two billion bytes": (program(pickle.LONG4 + struct.pack("<i", 2**31 - 1)), False),
        "a protocol of the future": (program(pickle.NONE, protocol=77), False),
        "three million operations": (program(pickle.NONE * 3_000_000), False),
        "many lists in each other": (
            program(pickle.EMPTY_LIST * 200_000, pickle.APPEND * 199_999),
            False,
        ),
        "a key of many tuples": (
            program(pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.TUPLE1 * 200_000, pickle.NONE, pickle.SETITEM),
            False,
        ),
        "a list in itself": (
            program(pickle.EMPTY_LIST, pickle.MEMOIZE, pickle.BINGET + b"\0", pickle.APPEND),
            False,
        ),
        "lists that double": (program(_doubling(60)), False),
        "nothing": (b"", False),
        "nothing but an end": (program(), False),
        "bytes that are no operations": (program(b"\xff\xfe"), False),
        # Before protocol 4 Python's own reader takes all of it for the name of one attribute, which there is not.
        "a name with dots, protocol 2": (
            program(named(_WITH_OS, "os.mkdir"), mkdir(canary), pickle.REDUCE, protocol=2),
            False,
        ),
        "a name with dots, as one operation": (
            program(named(_WITH_OS, "os.mkdir"), mkdir(canary), pickle.REDUCE),
            True,
        ),
    }


def _doubling(times: int) -> bytes:
    """A list of two lists that are one, of two that are one, and so on."""
    content = pickle.EMPTY_LIST + pickle.MEMOIZE
    for number in range(times):
        twice = (pickle.BINGET + bytes([number])) * 2
        content += pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.MARK + twice + pickle.APPENDS
    return content
