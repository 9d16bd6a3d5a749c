"""Parallel sizes that cannot be used stop with an error that names the key."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig, initialize, world_size
from ctpd_nemo.parallel.optimizer import OptimConfig

BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"tensor": 0}, 1, "parallel.tensor", "0"),
    ({"pipeline": -1}, 1, "parallel.pipeline", "-1"),
    ({"tensor": 2}, 3, "parallel", "tensor 2 x pipeline 1 x context 1 = 2 in a world of 3 processes"),
    ({"tensor": 4, "pipeline": 2}, 4, "parallel", "= 8 in a world of 4 processes"),
    ({"virtual_pipeline": 2}, 1, "parallel.virtual_pipeline", "2 with pipeline 1"),
    ({"pipeline": 2, "virtual_pipeline": 1}, 2, "parallel.virtual_pipeline", "1 with pipeline 2"),
    ({"sequence": True}, 1, "parallel.sequence", "true with tensor 1"),
    ({"recompute": "some"}, 1, "parallel.recompute", "'some'"),
    ({"overlap_param_gather": True}, 1, "parallel.overlap_param_gather", "true"),
    (
        {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed_optimizer": False},
        1,
        "parallel.overlap_param_gather",
        "true",
    ),
    ({"context": 2}, 3, "parallel", "tensor 1 x pipeline 1 x context 2 = 2 in a world of 3 processes"),
    ({"context": 2, "context_communication": "ring"}, 2, "parallel.context_communication", "'ring'"),
    ({"tensor": 2, "overlap_tensor": True}, 2, "parallel.overlap_tensor", "true without parallel.sequence"),
]


@pytest.mark.parametrize(("values", "processes", "place", "found"), BAD, ids=[str(case[0]) for case in BAD])
def test_sizes_that_make_no_layout_name_the_key(values: dict[str, Any], processes: int, place: str, found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)) as error:
        ParallelConfig(**values).check(processes)
    assert error.value.place == place


@pytest.mark.parametrize(
    ("values", "processes"),
    [
        ({}, 1),
        ({}, 7),
        ({"tensor": 2, "pipeline": 2}, 8),
        ({"pipeline": 2, "virtual_pipeline": 3}, 2),
        ({"tensor": 2, "sequence": True, "recompute": "full"}, 2),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True}, 2),
    ],
    ids=str,
)
def test_sizes_that_make_a_layout_pass(values: dict[str, Any], processes: int) -> None:
    ParallelConfig(**values).check(processes)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"schedule": "step"}, "optim.schedule"),
        ({"lr": -1.0}, "optim.lr"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"warmup_fraction": 1.0}, "optim.warmup_fraction"),
    ],
    ids=str,
)
def test_values_that_make_no_schedule_name_the_key(values: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError) as error:
        OptimConfig(**values).check()
    assert error.value.place == place


def test_initialize_stops_before_it_builds_groups_of_other_sizes() -> None:
    assert world_size() == 1
    with pytest.raises(InputError, match="in a world of 1 processes"):
        initialize(ParallelConfig(tensor=2))


def test_one_layout_after_the_other_leaves_no_groups_and_no_threads_behind() -> None:
    """In a process of its own: models of other tests hold the groups that they were built with."""
    code = """
import torch.distributed as dist
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from tests.parallel.test_layout import thread_count

initialize(ParallelConfig())
groups, threads = len(dist.distributed_c10d._world.pg_map), thread_count()
for minutes in (29, 28, 30):  # one process has no other layout than one of other limits
    initialize(ParallelConfig(timeout_minutes=minutes))
print(len(dist.distributed_c10d._world.pg_map) - groups, thread_count() - threads)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["0", "0"], done.stderr


def test_the_same_layout_keeps_its_groups() -> None:
    initialize(ParallelConfig())
    kept = parallel_state.get_data_parallel_group()
    initialize(ParallelConfig())
    assert parallel_state.get_data_parallel_group() is kept


def thread_count() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()
