"""Exceptions that are told in one line: bad input, and a process that has died."""

import reprlib
from typing import Any

# Characters of one part of a message; a library may quote all of what it could not read.
_LONGEST = 1000
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = 20


class InputError(ValueError):
    """Input that cannot be used: a config value, a file, a folder, a row of data.

    The message is one line that names the place (file and line, folder, or config key), what was found there
    and what was expected. The entry points in ``tools/`` print it without a traceback and exit with status 2.
    What a terminal would obey, or a reader not see, stands in it as escapes; what is longer than anyone reads is cut.
    """

    def __init__(self, place: str, found: str, expected: str) -> None:
        super().__init__(f"{_line(place)}: found {_line(found)}; expected {_line(expected)}")
        self.place = place
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str, str]]:
        # Dataloader workers send exceptions back by pickling; rebuild from the parts, not from the joined message.
        return type(self), (self.place, self.found, self.expected)


class WorkerDiedError(RuntimeError):
    """A worker process has died, by no fault of the input; the message says which, and how.

    The entry points in ``tools/`` print it without a traceback, which would be that of who waited for the worker, and
    exit with status 1, as a job that can be started again.
    """


def _line(text: str) -> str:
    """A path, an id or a library's own message as one line that a terminal shows as it is."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... ({len(text):,} characters) ... {text[-_LONGEST // 4 :]}"
    # Line breaks of a library's message are spaces: they are layout, not content.
    line = " ".join(text.splitlines())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: Any) -> str:
    """``repr(value)`` of what others chose, for a message: cut, however deep and long it is."""
    return _REPR.repr(value)
