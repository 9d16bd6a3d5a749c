"""Checkpoints as files: which are whole, which is the newest, and how they come and go.

A folder of checkpoints holds ``step-00000100`` and so on, and ``latest``, a line with the name of the newest. Each
checkpoint has a ``manifest.json``, written after everything else: the size and the BLAKE2b sum of every file. What is
being written, replaced, removed, or was found damaged, has another name until it is done.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.text_files import naming

logger = logging.getLogger(__name__)

LATEST = "latest"
_MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"step-\d{8,}")
_SUMS = ".sums-"
# Suffixes of what is no checkpoint: not yet, or no longer.
_WRITING, _REPLACED, _REMOVING, _DAMAGED = ".writing-", ".replaced", ".removing", ".damaged"
_THREADS = 4
_CHUNK = 2**20
_LONGEST_NAME = 256
# Files that are read whole: they are refused by size before they are read or summed. The index of a dense model of 70
# billion parameters on 1,024 devices has 8 MB, the manifest 170 bytes for each file, of which a rank writes a few.
_LARGEST = {".metadata": 2**26, "common.pt": 2**26, "metadata.json": 2**16, _MANIFEST: 2**24}

Sums = dict[str, dict[str, Any]]


# Writing


def being_written(final: Path, token: str) -> Path:
    """The name of a checkpoint until it is whole; ``token`` tells this attempt from others, which may be at it yet."""
    return final.with_name(f"{final.name}{_WRITING}{token}")


def write_sums(folder: Path, rank: int) -> None:
    """Leave the sums of the tensor files that a rank has written for ``write_manifest``, right after it wrote them."""
    sums = _sums(folder, sorted(path.name for path in folder.glob(f"__{rank}_*")))
    write_whole(folder / f"{_SUMS}{rank}", json.dumps(sums))


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint that has all its other files; those without sums of their rank are read.

    Raises:
        OSError: It cannot be written.
    """
    known: Sums = {}
    for path in folder.glob(f"{_SUMS}*"):
        known |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = known | _sums(folder, [name for name in names if name not in known])
    text = json.dumps({"format": _FORMAT, "files": files, "blake2b": _sum_of_json(files)}, indent=1)
    for name in names:
        flush(folder / name)
    write_whole(folder / _MANIFEST, text)


def give_name(writing: Path, final: Path) -> None:
    """Give a whole checkpoint its name; an old one of that name goes after the new one has it, not before.

    Raises:
        OSError: A folder cannot be renamed.
    """
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.replace(final, replaced)
    os.replace(writing, final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def point_to_latest(final: Path) -> None:
    """Make ``latest`` name a checkpoint; where it cannot be written, that is a warning, and it names what it did."""
    latest = final.with_name(LATEST)
    try:
        if not latest.is_file() or _line_of(latest) != final.name:
            write_whole(latest, final.name + "\n")
    except OSError as error:
        logger.warning("%s: not written: %s", latest, error)


def write_whole(path: Path, text: str) -> None:
    """Write a small file, all of it or nothing, and have it on the disk.

    Raises:
        OSError: It cannot be written.
    """
    writing = path.with_name(path.name + ".writing")
    try:
        with naming(path):
            with writing.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(writing, path)
            flush(path.parent)
    finally:
        writing.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk; some file systems know no such thing for folders.

    Raises:
        OSError: It cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(PermissionError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Going


def remove(folder: Path) -> None:
    """Delete a checkpoint: it loses its name at once, then its files.

    Raises:
        OSError: It cannot be renamed.
    """
    removing = folder.with_name(folder.name + _REMOVING)
    os.replace(folder, removing)
    shutil.rmtree(removing, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Take the name from a damaged checkpoint, which nobody counts or takes from then on; returns where it is.

    Raises:
        OSError: It cannot be renamed.
    """
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def clean(checkpoints: Path) -> None:
    """Clear away what a process that was killed has left half written or half removed.

    A checkpoint that was to be replaced by one that did not come gets its name back.
    """
    for path in checkpoints.glob(f"*{_REPLACED}"):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, final)
    for pattern in (f"*{_WRITING}*", f"*{_REMOVING}"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# Finding


def named_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Everything with the name of a checkpoint, whole or not, oldest first."""
    return sorted(path for path in Path(checkpoints).glob("step-*") if _NAME.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Checkpoints with a manifest and files of the sizes that it says, oldest first; their bytes are not read."""
    return [path for path in named_checkpoints(checkpoints) if find_damage(path, sums=False) is None]


def resolve(checkpoint: str | Path) -> Path:
    """A checkpoint by its own path, or by that of ``latest``, which names it.

    Raises:
        InputError: ``latest`` names no checkpoint.
    """
    path = Path(checkpoint)
    if path.name != LATEST or not path.is_file():
        return path
    name = _line_of(path)
    if not _NAME.fullmatch(name):
        raise InputError(str(path), repr(name), "the name of a checkpoint beside it")
    return path.with_name(name)


def _line_of(latest: Path) -> str:
    """What ``latest`` says, or the beginning of it, where that is more than a name."""
    with latest.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_NAME).strip()


def check_is_checkpoint(folder: str | Path, sums: bool = False) -> None:
    """Stop where a folder is no whole checkpoint.

    Args:
        folder: What should be one.
        sums: Read every file, and compare its sum.

    Raises:
        InputError: Names the first file that is not as it was written.
    """
    damage = find_damage(Path(folder), sums)
    if damage is not None:
        raise damage


def find_damage(folder: Path, sums: bool = True, part: int = 0, parts: int = 1) -> InputError | None:
    """What is wrong with a checkpoint; ``None`` for a whole one.

    Args:
        folder: The checkpoint.
        sums: Read files, and compare their sums; without it, look at names and sizes.
        part: Which share of the files is read, where ranks share them.
        parts: Over how many ranks.
    """
    if not folder.is_dir():
        return InputError(str(folder), "nothing", "a checkpoint folder written by training")
    try:
        files = read_manifest(folder)
        for name, file in files.items():
            open_file(folder / name, file["bytes"]).close()
        names = list(files)[part::parts] if sums else []
        for name, read in _sums(folder, names).items():
            if read["blake2b"] != files[name]["blake2b"]:
                return InputError(str(folder / name), "other bytes", "those that were written (their checksum differs)")
    except InputError as error:
        return error
    except OSError as error:
        return InputError(str(error.filename or folder), f"what cannot be read ({error.strerror})", "a checkpoint")
    return None


def open_file(path: Path, size: int) -> io.FileIO:
    """A file of a checkpoint, without a buffer: one of its own folder, never one that a link there leads to.

    Args:
        path: The file.
        size: How many bytes it has, by the manifest.

    Raises:
        InputError: It is none, or has another size.
        OSError: It cannot be read.
    """
    expected = f"{size:,} bytes, as were written"
    try:
        # A pipe would have its reader wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(str(path), "nothing", expected) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(str(path), "a link", "a file of the checkpoint's own, as it was written") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        os.close(descriptor)
        found = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise InputError(str(path), found, expected)
    return io.FileIO(descriptor, "rb")


def read_manifest(folder: Path) -> Sums:
    """The files of a checkpoint beside the manifest, by name, with their ``bytes`` and ``blake2b`` sums.

    Raises:
        InputError: There is no manifest, or a damaged one.
    """
    path = folder / _MANIFEST
    if not path.exists():
        raise InputError(str(folder), f"a folder without {_MANIFEST}", "a checkpoint folder written by training")
    try:
        size = path.lstat().st_size
        if size > _LARGEST[_MANIFEST]:
            raise ValueError(f"of {size:,} bytes")
        with open_file(path, size) as file:
            manifest = json.loads(file.read())
        files = manifest["files"]
        good = manifest["format"] == _FORMAT and manifest["blake2b"] == _sum_of_json(files)
        good = good and all(_is_entry(name, entry) for name, entry in files.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        good = False
    if not good:
        raise InputError(str(path), "no manifest, or a damaged one", "the manifest of a checkpoint")
    for name in _LARGEST.keys() & files.keys():
        if files[name]["bytes"] > _LARGEST[name]:
            found = f"{files[name]['bytes']:,} bytes"
            raise InputError(str(folder / name), found, f"{_LARGEST[name]:,} bytes at most, as such files have")
    return files


def _is_entry(name: str, entry: dict[str, Any]) -> bool:
    plain = bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}
    return plain and type(entry["bytes"]) is int and entry["bytes"] >= 0 and type(entry["blake2b"]) is str


def _sums(folder: Path, names: Iterable[str]) -> Sums:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing and reading leave the interpreter free
        names = list(names)
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path: Path) -> dict[str, Any]:
    digest, size = hashlib.blake2b(digest_size=32), 0
    with open_file(path, path.lstat().st_size) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _sum_of_json(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()
