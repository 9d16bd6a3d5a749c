"""Points of a job at which it is to be killed: calls of functions, before, after or, by a fork that goes on, beside."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from ctpd_nemo.convert import export
from ctpd_nemo.models import base
from ctpd_nemo.parallel import checkpoint_files, checkpoint_writer
from ctpd_nemo.pipeline import score_cache, stages, step_rows
from ctpd_nemo.pipeline.callbacks import MetricLog

Where = tuple[Any, str, str]

TRAINING: dict[str, Where] = {
    "before a step": (base.MegatronModel, "training_step", "before"),
    "after a step, before its row": (MetricLog, "_append", "before"),
    "after a row": (MetricLog, "_append", "after"),
    "in a log that is cut back": (step_rows, "write_whole", "before"),
}
SAVING: dict[str, Where] = {
    "before a save": (checkpoint_writer, "_begin", "before"),
    "in an empty folder": (checkpoint_writer, "_begin", "after"),
    "after the plan": (checkpoint_writer, "_request", "after"),
    "in a tensor file": (filesystem_async, "_write_item", "after"),
    "beside a tensor file": (filesystem_async, "_write_item", "beside"),
    "before the sums": (checkpoint_files, "write_sums", "before"),
    "after the sums": (checkpoint_files, "write_sums", "after"),
    "before all meet": (checkpoint_writer, "first_reason", "before"),
}
# What the first rank does alone; renames are those of sums, manifest, checkpoint, latest, and what is removed.
COMPLETING: dict[str, Where] = {
    "before the manifest": (checkpoint_files, "write_manifest", "before"),
    "after the manifest": (checkpoint_files, "write_manifest", "after"),
    "after the name": (checkpoint_files, "give_name", "after"),
    "before latest": (checkpoint_files, "point_to_latest", "before"),
    "before a rename": (os, "replace", "before"),
    "after a rename": (os, "replace", "after"),
}
SCORING: dict[str, Where] = {
    "before a shard is written": (score_cache.ScoreWriter, "write", "before"),
    "in a shard": (score_cache.pq, "write_table", "after"),
    "after a shard": (score_cache.ScoreWriter, "write", "after"),
}
EXPORTING: dict[str, Where] = {
    "in an export": (export.HFWriter, "add", "before"),
    "before an export has its name": (export.HFWriter, "_finish", "before"),
    "after an export": (export.HFWriter, "_finish", "after"),
    # The first status says that the stage has begun, the second that it is complete.
    "before a stage has begun": (stages, "write_status", "before"),
    "after a stage has begun": (stages, "write_status", "after"),
    "before a stage is complete": (stages, "write_status", "before"),
    "after a stage is complete": (stages, "write_status", "after"),
}
POINTS = TRAINING | SAVING | COMPLETING | SCORING | EXPORTING


def install(fault: dict[str, Any], pid: int) -> None:
    """Send ``signal`` to a rank's process at the ``nth`` time (from 1) that it, or a fork of it, is at a ``point``."""
    owner, name, when = POINTS[fault["point"]]
    setattr(owner, name, _struck(getattr(owner, name), when, fault["nth"], fault["signal"], pid))


def _struck(function: Callable[..., Any], when: str, nth: int, number: int, pid: int) -> Callable[..., Any]:
    # Forks count on.
    calls = multiprocessing.Value("i", 0)

    def strike() -> None:
        with calls.get_lock():
            calls.value += 1
            due = calls.value == nth
        if due:
            os.kill(pid, number)
            parent = multiprocessing.parent_process()
            if when == "beside" and parent is not None:
                parent.join()
            elif number == signal.SIGKILL and os.getpid() != pid:
                # A fork in the middle of a file.
                os._exit(1)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            strike()
        result = function(*args, **kwargs)
        if when in ("after", "beside"):
            strike()
        return result

    return call
