"""A script in a process of its own, which may take so much time and memory and no more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# A process that waits, as for a file system that hangs, uses no CPU.
_WALL_SECONDS = 600
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Each arena of glibc reserves addresses, which are limited.
    "MALLOC_ARENA_MAX": "2",
    "RUST_BACKTRACE": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


class LimitError(Exception):
    """The process did not end well: it took too much, or it failed; the text says which."""


def run_limited(script: Path, seconds: int, size: int, **given: Any) -> dict[str, Any]:
    """Run a script that reads its arguments as a JSON object, limits itself, and prints a JSON object.

    It is started anew and never forked, so that threads, CUDA and locks of this process are none of its own.

    Args:
        script: Limits itself to what ``seconds`` and ``bytes`` of its arguments say; ``path`` is this process's path.
        seconds: CPU time that it may take.
        size: Bytes of memory that it may take beyond what it begins with.
        given: Further arguments.

    Raises:
        LimitError: It took more, or failed.
    """
    arguments = json.dumps({**given, "seconds": seconds, "bytes": size, "path": sys.path})
    # -I: neither the environment nor the working folder says what is imported; -S: ``path`` does.
    command = [sys.executable, "-I", "-S", "-B", str(script), arguments]
    try:
        done = subprocess.run(
            command, env=os.environ | _ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WALL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise LimitError(f"no end after {_WALL_SECONDS} s") from error
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise LimitError(f"more than {seconds} CPU seconds")
    if done.returncode == -signal.SIGABRT or "MemoryError" in said or "memory allocation" in said:
        raise LimitError(f"more than {size / 2**30:g} GiB of memory")
    if done.returncode < 0:
        raise LimitError(f"killed by {signal.Signals(-done.returncode).name}")
    raise LimitError(said.splitlines()[-1] if said else f"status {done.returncode}")
