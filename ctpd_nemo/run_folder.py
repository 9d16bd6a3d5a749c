"""The folder of a job, which it makes once: one that is removed under the job is not made anew.

A folder that came back with a part of what it held would look like a whole run and be none.
"""

from pathlib import Path

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
