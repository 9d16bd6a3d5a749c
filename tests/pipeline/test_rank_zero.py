"""What rank 0 does for all: the others wait as long as it takes, and fail as it fails."""

import errno
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.standstill import Standstill, record_collectives
from ctpd_nemo.pipeline import rank_zero
from ctpd_nemo.pipeline.rank_zero import on_rank_0, on_rank_0_however_long
from tests.losses.ranks import run_ranks

WORLD = 3
# How often each rank is looked at while the task is done, and how often ranks meet between two looks: twice, so that
# one meeting at least is all between them.
LOOKS, MEETINGS = 10, 2


def task(folder: Path) -> str:
    """Takes as long as all ranks take to be looked at, longer than any collective among them."""
    while not all((folder / f"looked-{number}").exists() for number in range(WORLD)):
        time.sleep(0.01)
    return "done"


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a file")


def refuse() -> None:
    raise InputError("a place", "this", "that")


class Meetings:
    """Counts how often this rank has set out to meet the others."""

    def __init__(self) -> None:
        self.count = 0

    def counted(self, meet: Callable[..., Any], *args: Any) -> Any:
        self.count += 1
        return meet(*args)


def look(meetings: Meetings, stood: list[float], looked: Path) -> None:
    """What the watch for hangs sees of this rank: for how long it has stood at each look."""
    standstill = Standstill()
    for _ in range(LOOKS):
        stood.append(standstill.look().seconds)
        before = meetings.count
        while meetings.count < before + MEETINGS:
            time.sleep(0.01)
    looked.touch()


def rank(number: int, folder: str) -> None:
    meetings, stood = Meetings(), []
    rank_zero._LONGEST_WAIT = 0.1
    rank_zero.on_rank_0 = functools.partial(meetings.counted, on_rank_0)
    record_collectives()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD)
    watch = threading.Thread(target=look, args=(meetings, stood, Path(folder, f"looked-{number}")), daemon=True)
    watch.start()
    told = [on_rank_0_however_long(functools.partial(task, Path(folder)))]
    watch.join()
    # However long it was between two looks.
    told.append("moved" if max(stood) == 0 else f"stood for {stood} s")
    for wrong in (fail, refuse):
        for way in (on_rank_0, on_rank_0_however_long):
            try:
                way(wrong)
            except (OSError, InputError) as error:
                told.append(str(error))
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"rank-{number}").write_text("\n".join(told))


def test_ranks_wait_longer_than_a_collective_may_and_fail_together(tmp_path: Path) -> None:
    """They meet while they wait, and whoever looks at them sees that they do."""
    run_ranks(rank, tmp_path)
    full = "[Errno 28] No space left on device: 'a file'"
    refused = str(InputError("a place", "this", "that"))
    for number in range(WORLD):
        lines = (tmp_path / f"rank-{number}").read_text().splitlines()
        assert lines == ["done", "moved", full, full, refused, refused], number
