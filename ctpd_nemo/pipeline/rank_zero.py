"""What one process finds out or does for all of them."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

from ctpd_nemo.errors import InputError

T = TypeVar("T")
_END = object()
# Seconds that other ranks wait for a task before they meet: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 20.0


def on_rank_0(task: Callable[[], T]) -> T:
    """What ``task`` returns on rank 0, on every rank; every rank calls it together, process groups are there.

    Files may look different to ranks that look at different times, or on different nodes: what steers a job is looked
    up once.

    Raises:
        InputError: Raised by the task on rank 0; then it is raised on every rank.
        OSError: Likewise.
    """
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [task()]
        except (InputError, OSError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], InputError | OSError):
        raise result[0]
    return result[0]


def on_rank_0_however_long(task: Callable[[], T]) -> T:
    """The same for a task that may take longer than a collective's time limit: ranks meet while a thread does it."""
    if dist.get_world_size() == 1:
        return task()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(task) if dist.get_rank() == 0 else None
        patience = _FIRST_WAIT
        while not on_rank_0(functools.partial(_ended, running, patience)):
            patience = min(2 * patience, _LONGEST_WAIT)
        return on_rank_0(lambda: running.result())  # type: ignore[union-attr]


def _ended(running: Future[Any] | None, seconds: float) -> bool:
    assert running is not None
    wait([running], seconds)
    return running.done()


def on_rank_0_in_parts(parts: Iterable[object]) -> None:
    """Go through work on rank 0 while the others wait, however long all of it takes; every rank calls it together.

    Ranks meet after every part, so that the time limit of a collective holds for a part. The other ranks leave
    ``parts`` alone.

    Raises:
        InputError: Raised by a part on rank 0; then it is raised on every rank.
    """
    work = iter(parts)
    while on_rank_0(lambda: next(work, _END) is not _END):
        pass
