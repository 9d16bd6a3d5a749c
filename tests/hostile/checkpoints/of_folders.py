"""Folders whose files are not what they seem, and manifests that say so."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.checkpoints.family import Attack

MANIFEST = "manifest.json"


def write_manifest(folder: Path, files: Any, **changed: Any) -> None:
    """A manifest that its own sum fits, whatever it says."""
    blake2b = hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=32).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files, "blake2b": blake2b, **changed}))


def _files(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    def edit(folder: Path, canary: Path) -> None:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        changed = change(files)
        write_manifest(folder, files if changed is None else changed)

    return edit


def _entry(name: str, **changed: Any) -> Callable[[Path, Path], None]:
    return _files(lambda files: files[name].update(changed))


def _linked(name: str) -> Callable[[Path, Path], None]:
    """The same bytes, outside of the folder."""

    def edit(folder: Path, canary: Path) -> None:
        outside = canary.with_name("outside")
        outside.mkdir()
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)

    return edit


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def edit(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def _sparse(name: str) -> Callable[[Path, Path], None]:
    """A file larger than memory that takes no room, with a manifest that fits as far as anyone looks."""

    def edit(folder: Path, canary: Path) -> None:
        os.truncate(folder / name, 2**40)
        if name != MANIFEST:
            _entry(name, bytes=2**40)(folder, canary)

    return edit


def _without(name: str) -> Callable[[Path, Path], None]:
    def edit(folder: Path, canary: Path) -> None:
        (folder / name).unlink()
        _files(lambda files: files.pop(name) and None)(folder, canary)

    return edit


def _format(content: str) -> Callable[[Path, Path], None]:
    return lambda folder, canary: (folder / "metadata.json").write_text(content)


SHARD = "__0_0.distcp"
FORMATS = {
    "another backend": '{"sharded_backend": "zarr"}',
    "a backend that is a list": '{"sharded_backend": ["torch_dist"]}',
    "no backend": "{}",
    "no object": '"torch_dist"',
    "no JSON": "{",
    "no end": "[" * 50_000,
    "more than anyone writes": '{"sharded_backend": "torch_dist"}' + " " * 70_000,
}
MANIFESTS: dict[str, Callable[[Path, Path], None]] = {
    "that is a list": lambda folder, canary: (folder / MANIFEST).write_text("[]"),
    "of a list": _files(lambda files: list(files)),
    "of text": _files(lambda files: "files"),
    "of numbers": _files(lambda files: dict.fromkeys(files, 1)),
    "of no files": _files(lambda files: {}),
    "without end": lambda folder, canary: (folder / MANIFEST).write_text('{"files":' * 100_000),
    "of a file elsewhere": _files(lambda files: files.update({"../step-00000001/common.pt": files[SHARD]})),
    "of a file of the system": _files(lambda files: files.update({"/etc/passwd": files[SHARD]})),
    "of a name that ends early": _files(lambda files: files.update({"a\0": files[SHARD]})),
    "of the folder": _files(lambda files: files.update({"..": files[SHARD]})),
    "of a fraction of bytes": _entry(SHARD, bytes=1.5),
    "of true bytes": _entry(SHARD, bytes=True),
    "of negative bytes": _entry(SHARD, bytes=-1),
    "of bytes that are text": _entry(SHARD, bytes="1"),
    "of bytes without end": _entry(SHARD, bytes=10**400),
    "of a sum that is none": _entry(SHARD, blake2b=None),
    "of another sum": _entry(SHARD, blake2b="0" * 64),
    "of another format": lambda folder, canary: write_manifest(folder, {}, format=2),
    "of another sum of its own": lambda folder, canary: write_manifest(folder, {}, blake2b="0"),
    "without an index": _without(".metadata"),
    "without a format": _without("metadata.json"),
    "without a shard": _without(SHARD),
}


def folder_attacks() -> Iterator[Attack]:
    for name, edit in MANIFESTS.items():
        yield Attack(f"a manifest {name}", edit, fits=False)
    for name in (SHARD, ".metadata", "metadata.json", MANIFEST):
        yield Attack(f"a link out of the folder for {name}", _linked(name), fits=False)
    for name, device in ((SHARD, "/dev/zero"), (".metadata", "/dev/zero"), (MANIFEST, "/dev/zero")):
        link = lambda path, device=device: path.symlink_to(device)  # noqa: E731
        yield Attack(f"{device} for {name}", _instead(name, link), fits=False)
        yield Attack(f"a pipe for {name}", _instead(name, os.mkfifo), fits=False)
        yield Attack(f"a folder for {name}", _instead(name, Path.mkdir), fits=False)
    for name in (".metadata", "metadata.json", MANIFEST):
        yield Attack(f"a terabyte of {name}", _sparse(name), fits=False)
    for name, content in FORMATS.items():
        yield Attack(f"a format with {name}", _format(content))
