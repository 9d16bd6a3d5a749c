"""Errors that no one foresaw: told on the terminal once, whole in a file of every rank that met one."""

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from ctpd_nemo.errors import WorkerDiedError
from ctpd_nemo.run_folder import make_within

# Where torchrun reads what a process ended of.
_LAUNCHER_FILE = "TORCHELASTIC_ERROR_FILE"
_ENDED = "ended-before-its-time"


def fail(error: BaseException, run_dir: str | None) -> None:
    """Tell of an error that ends this process: all of it in ``logs/error-rank-N.txt``, once for all on the terminal.

    The rank that gets here first prints its traceback, or one line over a dataloader worker that has died: the others
    mostly fail because it did.

    Args:
        error: What was raised; call it while it is handled.
        run_dir: The run folder; ``None`` where the tool has none, or it is not known.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    one_line = isinstance(error, WorkerDiedError)
    told = f"error: {error}\n" if one_line else "".join(traceback.format_exception(error))
    path = _write(told, rank, run_dir) if ranks > 1 else None
    first = is_first()
    if first:
        where = f"rank {rank} of {ranks}, on {socket.gethostname()}:\n" if ranks > 1 else ""
        others = f"other ranks that fail write theirs beside {path}\n" if path else ""
        print(f"{where}{told}{others}", end="", file=sys.stderr, flush=True)
    what = traceback.format_exception_only(error)[-1].strip() if first else "failed after another rank did"
    tell_launcher(f"{what}; {path}" if path else what)


def tell_launcher(message: str) -> None:
    """Have ``torchrun`` say of this rank a line that means something, in the report that it ends with.

    It reads the file that it names to each of its processes, see ``torch.distributed.elastic.multiprocessing.errors``.
    """
    file = os.environ.get(_LAUNCHER_FILE)
    if file:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        content = {"message": {"message": message, "extraInfo": details}}
        try:
            Path(file).write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            print(f"{file}: not written: {error}", file=sys.stderr)


def is_first() -> bool:
    """Whether this is the first process of the job to end before its time; of its node, where there is no store.

    Errors may meet every rank, or one alone; and where one has ended, the others fail for want of it.
    """
    if dist.is_initialized():
        if dist.get_world_size() == 1:
            return True
        try:
            return dist.distributed_c10d._get_default_store().add(_ENDED, 1) == 1
        except RuntimeError:
            # It went with the process that held it.
            pass
    file = os.environ.get(_LAUNCHER_FILE)
    if not file:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        # Each process has a folder of its own in one that torchrun has made for this start of the node.
        (Path(file).parent.parent / _ENDED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return True


def _write(told: str, rank: int, run_dir: str | None) -> Path | None:
    """The file; ``None`` where there is no folder for it, or not any more, or no room in it."""
    if run_dir is None:
        return None
    try:
        path = make_within(Path(run_dir), "logs") / f"error-rank-{rank}.txt"
        path.write_text(told, encoding="utf-8")
    except OSError:
        return None
    return path
