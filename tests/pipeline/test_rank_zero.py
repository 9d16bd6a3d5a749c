"""What rank 0 does for all: the others wait as long as it takes, and fail as it fails."""

import errno
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.standstill import Standstill, record_collectives
from ctpd_nemo.pipeline import rank_zero
from ctpd_nemo.pipeline.rank_zero import on_rank_0, on_rank_0_however_long
from tests.losses.ranks import run_ranks

# Seconds that a collective may take, and that the task takes.
LIMIT, TASK = 3, 8


def task() -> str:
    time.sleep(TASK)
    return "done"


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "a file")


def refuse() -> None:
    raise InputError("a place", "this", "that")


def look(stood: list[float], ended: threading.Event) -> None:
    """What the watch for hangs sees of this rank."""
    standstill = Standstill()
    while not ended.wait(0.2):
        standing = standstill.look()
        stood.append(standing.seconds if standing.waits else 0.0)


def rank(number: int, folder: str) -> None:
    rank_zero._LONGEST_WAIT = 1.0
    record_collectives()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=3, timeout=timedelta(seconds=LIMIT))
    stood, looks = [], threading.Event()
    watch = threading.Thread(target=lambda: look(stood, looks), daemon=True)
    watch.start()
    told = [on_rank_0_however_long(task)]
    looks.set()
    watch.join()
    told.append("moved" if max(stood) < LIMIT else f"stood for {max(stood):.1f} s")
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
    run_ranks(rank, tmp_path)
    full = "[Errno 28] No space left on device: 'a file'"
    refused = str(InputError("a place", "this", "that"))
    for number in range(3):
        lines = (tmp_path / f"rank-{number}").read_text().splitlines()
        assert lines == ["done", "moved", full, full, refused, refused], number
