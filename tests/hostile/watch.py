"""What a process did while it was watched: files opened for writing, pickles that asked for something, commands."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctpd_nemo.data import tokenizer_probe

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_MOVES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


@dataclass
class Watched:
    """What was seen.

    Attributes:
        written: Paths that were opened for writing, made, moved or removed.
        named: What pickles asked for, ``module.name``.
        commands: Programs that were started, and hosts that were called. The one process in which we try what a
            tokenizer costs is left out.
    """

    written: set[Path] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    commands: list[str] = field(default_factory=list)


_watching: list[Watched] = []
_installed = False


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    seen = _watching[-1]
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and isinstance(flags, int) and flags & _WRITING:
            seen.written.add(Path(os.path.abspath(os.fsdecode(path))))
    elif event in _MOVES:
        paths = [argument for argument in arguments[:2] if isinstance(argument, str | bytes)]
        seen.written.update(Path(os.path.abspath(os.fsdecode(path))) for path in paths)
    elif event == "pickle.find_class":
        seen.named.add(".".join(arguments))
    elif event in _COMMANDS and str(tokenizer_probe.__file__) not in str(arguments[1:2]):
        seen.commands.append(f"{event} {arguments[:2]}")


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Watch this process by an audit hook, which sees all that Python does and nothing that a library's C code does."""
    global _installed
    if not _installed:
        sys.addaudithook(_see)
        _installed = True
    seen = Watched()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.pop()
