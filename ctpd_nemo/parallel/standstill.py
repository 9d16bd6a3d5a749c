"""Whether this process moves and whether it waits for others, by its main thread's stack and torch's recorder."""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Where Python code of torch and Megatron waits for other ranks: collectives, and messages between pipeline stages.
_WAITING = ("torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py")
# Torch 2.9 has new names, and warns of those before.
_BUFFER_SIZE, _DUMP_FILE = (
    ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
    else ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
)
# Torch's recorders: NCCL's, in builds for CUDA, and that of the other backends; each has its own record.
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

# Of each frame, innermost first: file, line, function, and the instruction in it.
Stack = tuple[tuple[str, int, str, int], ...]


@dataclass(frozen=True)
class Standing:
    """What a process is at.

    Attributes:
        line: The innermost function of its main thread, and the line of this project that it is called from.
        waits: Whether it waits for other ranks.
        seconds: For how long nothing has moved.
    """

    line: str
    waits: bool
    seconds: float


class Standstill:
    """Looks at this process now and then, from another thread than the main one."""

    def __init__(self) -> None:
        self._stack: Stack = ()
        self._newest: list[int] | None = None
        self._since = time.monotonic()

    def look(self) -> Standing:
        """What the main thread is at; it has moved where its stack or the last collective is another than before.

        The records of collectives take tens of milliseconds to read: they are read where the stack is as it was.
        """
        stack, now = _main_stack(), time.monotonic()
        waits = bool(stack) and stack[0][0].endswith(_WAITING)
        if stack != self._stack:
            self._stack, self._newest, self._since = stack, None, now
        else:
            last_of_groups = _newest_collectives()
            newest = [entry["record_id"] for entry in last_of_groups]
            if newest != self._newest:
                self._newest, self._since = newest, now
            waits |= any(not _is_done(entry) for entry in last_of_groups)
        return Standing(_line(stack), waits, now - self._since)


def record_collectives() -> None:
    """Have torch record collectives, and NCCL's watchdog write the record down; before process groups are made.

    The variables of the environment are torch's only way to say it; those that are set stay.
    """
    os.environ.setdefault(_BUFFER_SIZE, "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def name_records(prefix: Path) -> None:
    """Where NCCL's watchdog writes; the name ends in the rank."""
    os.environ[_DUMP_FILE] = str(prefix)


def flight_records() -> list[dict[str, Any]]:
    """The collectives of this process so far: a record for each of torch's recorders that has any, NCCL's first."""
    dumps = [getattr(torch._C._distributed_c10d, name, None) for name in _RECORDERS]
    records = [json.loads(dump() or "{}") for dump in dumps if dump is not None]
    return [record for record in records if record.get("entries")]


def _newest_collectives() -> list[dict[str, Any]]:
    """The last entry of each process group, in each of the records: a group may be in both."""
    newest: list[dict[str, Any]] = []
    for record in flight_records():
        entries = sorted(record["entries"], key=lambda entry: entry["record_id"])
        newest += {entry["pg_id"]: entry for entry in entries}.values()
    return newest


def _is_done(entry: dict[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _main_stack() -> Stack:
    frame, stack = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name, frame.f_lasti))
        frame = frame.f_back
    return tuple(stack)


def _line(stack: Stack) -> str:
    if not stack:
        return "no Python code"
    file, line, function, _ = stack[0]
    own = next(((file, line) for file, line, _, _ in stack if file.startswith(_PACKAGE)), None)
    if own is None or own == (file, line):
        return f"{function}, {file}:{line}"
    return f"{function}, called at ctpd_nemo/{own[0].removeprefix(_PACKAGE)}:{own[1]}"
