"""The folder of a job, which it makes once: one that is removed under the job is not made anew.

A folder that came back with a part of what it held would look like a whole run and be none.
"""

import os
from pathlib import Path

from ctpd_nemo.errors import InputError

# Those that a job of this process is at work in.
_made: set[Path] = set()


def make_run_folder(folder: Path) -> None:
    """Make the folder that a job is at work in from now on; every process of it calls this.

    Raises:
        OSError: It cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _made.add(folder.absolute())


def make_within(folder: Path, name: str) -> Path:
    """Make a folder in that of a job, and that of the job only where no job is at work in it yet.

    Raises:
        OSError: It cannot be made; ``FileNotFoundError`` where the job's folder is gone.
    """
    path = folder / name
    path.mkdir(parents=folder.absolute() not in _made, exist_ok=True)
    return path


def check_run_folder(folder: Path) -> None:
    """Stop where a folder that a job goes on in has what no job has written, in place of a file that it will write to.

    A pipe would keep it waiting for ever, a device fill the disk of whoever reads; a link, which may come with the
    folder of somebody else, would have it write to any file of its user's. Links to folders are a user's own disks.

    Raises:
        InputError: It names the first of them.
    """
    for place in (folder, folder / "logs"):
        if not place.is_dir():
            continue
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.is_file(follow_symlinks=False) and not _is_folder(entry):
                    found = "a link that leads to no folder" if entry.is_symlink() else "no regular file"
                    raise InputError(entry.path, found, "a file that a job has written, or none")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link in a circle.
        return False
