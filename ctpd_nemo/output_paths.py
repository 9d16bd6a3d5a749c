"""What a job is to write: whether its folders and files can be made, found out before any work."""

import os
import unicodedata
from pathlib import Path

from ctpd_nemo.errors import InputError

# Bytes that names of folders and files get while they are written, locked or moved aside: ".NAME.writing-0123456789ab".
ADDED = 24
# Bytes of what lies in a folder, below it: a stage's name, and that of a file that is written into a checkpoint.
BELOW = 512
# Of Linux, where the file system says nothing.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
# Control characters, surrogates (bytes of a command line that are no UTF-8) and Unicode's own line breaks.
_NO_NAME = ("Cc", "Cs", "Zl", "Zp")
_FOLDER, _FILE = "a folder to write to", "a file to write"


def output_folder(key: str, value: object) -> Path:
    """The folder that a config value names, which is there and can be written to, or can be made.

    Nothing is made.

    Args:
        key: The config key, to name in an error.
        value: What it holds.

    Raises:
        InputError: It is no name of a folder, or of one that the file system cannot hold; a file has that name, or that
            of a folder on the way; there is no permission.
    """
    path = _path(key, value, _FOLDER)
    _check_folder(key, path, _FOLDER)
    return path


def output_file(key: str, value: object) -> Path:
    """The file that a config value names, which can be made, or replaced.

    Raises:
        InputError: As of ``output_folder``; or what has that name is no regular file.
    """
    path = _path(key, value, _FILE)
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise InputError(key, f"{_shown(path)}, which is {kind}", _FILE)
    _check_folder(key, path.parent, _FILE)
    return path


def written_folder(key: str, value: Path) -> None:
    """Stop where an existing folder, which a job adds files to, cannot be written to.

    Raises:
        InputError: There is no permission.
    """
    _check_folder(key, value, _FOLDER)


def _path(key: str, value: object, expected: str) -> Path:
    """The path that a value is, if it is one that a file system can hold."""
    if isinstance(value, bool) or not isinstance(value, str | int | Path) or not str(value):
        raise InputError(key, "nothing" if value is None else repr(value), expected)
    text = str(value)
    for character in text:
        if unicodedata.category(character) in _NO_NAME:
            raise InputError(key, f"{text!r}, with {character!r} in it", f"{expected}, in characters of a name")
    if "${" in text:
        raise InputError(key, repr(text), f"{expected}, without ${{, which Hydra takes for a reference")
    path = Path(text)
    # The root, the working folder and those above it are no job's own.
    if path.name in ("", ".."):
        raise InputError(key, repr(text), f"{expected}, by a name of its own")
    _check_lengths(key, path, expected)
    return path


def _check_lengths(key: str, path: Path, expected: str) -> None:
    for part in path.parts:
        if len(os.fsencode(part)) > _LONGEST_NAME:
            raise InputError(key, f"a name of {len(os.fsencode(part))} bytes, {_shown(part)}", _at_most(expected))
    whole = len(os.fsencode(path.absolute()))
    if whole > _LONGEST_PATH - BELOW:
        found = f"a path of {whole:,} bytes, {_shown(path)}"
        raise InputError(key, found, f"{expected}, whose path has {_LONGEST_PATH - BELOW:,} bytes at most")
    longest = _longest_name(_nearest(path)) - ADDED
    if len(os.fsencode(path.name)) > longest:
        found = f"a name of {len(os.fsencode(path.name))} bytes, {_shown(path.name)}"
        raise InputError(key, found, _at_most(expected, longest))


def _at_most(expected: str, longest: int = _LONGEST_NAME - ADDED) -> str:
    return f"{expected}, by a name of {longest} bytes at most"


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return _LONGEST_NAME


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    path = path.absolute()
    return next((one for one in (path, *path.parents) if os.path.lexists(one)), Path(path.anchor))


def _check_folder(key: str, folder: Path, expected: str) -> None:
    """Stop where a folder is none, or cannot be written to; of one that is to be made, the nearest above it."""
    there = _nearest(folder)
    if not there.is_dir():
        kind = "a file" if there.exists() else "a link to nothing"
        raise InputError(key, f"{_shown(folder)}, where {_shown(there)} is {kind}", expected)
    if os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return
    read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    why = "on a file system that is read-only" if read_only else "a folder without permission to write in"
    raise InputError(key, f"{_shown(there)}, {why}", expected)


def _shown(path: Path | str) -> str:
    """A path, or the beginning of one that nobody would read."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
