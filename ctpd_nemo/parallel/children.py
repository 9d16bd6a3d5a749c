"""Processes that a job starts, and that are not to outlive it."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a process that ``multiprocessing`` started: end it as soon as its parent is gone, killed or not."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
