"""One job at a time in a run folder: a second would clear away what the first is writing."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from ctpd_nemo.errors import InputError

# Where srun or mpirun has started several processes, each by itself.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Open files whose locks say that this process is at work in a folder.
_claims: dict[Path, IO[str]] = {}


def _open_lock(name: str, flags: int) -> int:
    """Open a file of one's own: neither what a link leads to nor a pipe, which may have come with the folder beside."""
    return os.open(name, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def claim(folder: Path) -> None:
    """Keep other jobs out of a folder until this process ends, however it ends; rank 0 does it.

    The lock is a file beside the folder, which may itself be moved away.

    Raises:
        InputError: Another job is at work in it.
    """
    folder = folder.resolve()
    path = folder.with_name(f".{folder.name}.lock")
    if path in _claims:
        return
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w", opener=_open_lock)  # noqa: SIM115 as long as this process is there
    except PermissionError:
        # The folder is all that is one's own, and nobody can tell.
        return
    except (FileExistsError, NotADirectoryError):
        # There can be no such folder, as is told where it is made.
        return
    try:
        # Not flock: workers that outlive a killed process would hold what they have inherited.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            expected = f"a run_dir of its own for each (the other one has locked {path})"
            if any(os.environ.get(name, "1") not in ("", "1") for name in _TASKS) and "WORLD_SIZE" not in os.environ:
                expected += "; or torchrun, which makes one job of several processes"
            raise InputError(str(folder), "another job at work in it", expected) from error
        # A file system without locks: nobody can tell.
        return
    _claims[path] = lock
