"""Three processes that share a vocabulary."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ctpd_nemo.losses import logprobs
from tests.forks.client import run_forked

# Ranks and rows of each: one row of padding at the end of the second; a third rank that holds padding only.
SHARED = ((2, 19), (3, 19))
SHARED_IDS = ["two ranks", "three ranks, one of padding only"]
_WORLD = 3


def run_ranks(task: Callable[[int, str], None], folder: Path) -> Path:
    """Run ``task(rank, folder)`` in three processes at once; they write what they compute to the folder."""
    function = f"{task.__module__}:{task.__qualname__}"
    done = run_forked(folder, _WORLD, function=function, arguments=[str(folder)])
    assert done.statuses == [0] * _WORLD, done.stderr
    return folder


def shared_cases(rank: int, folder: str) -> Iterator[tuple[int, int, dist.ProcessGroup]]:
    """In a rank: world size, rows and group of each of ``SHARED`` that it is in, with room for five tokens' logits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=_WORLD)
    logprobs.CHUNK_LOGITS["cpu"] = 5 * 19
    for world, rows in SHARED:
        group = dist.new_group(list(range(world)))
        if rank < world:
            yield world, rows, group
    dist.barrier()
    dist.destroy_process_group()
