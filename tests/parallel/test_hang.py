"""Who is named where ranks wait for each other, and what a rank knows of itself."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ctpd_nemo.parallel.hang import HangWatch, Report, explain
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.standstill import Standing, Standstill


def report(beat: int, waits: bool, at: float = 100.0, line: str = "all_reduce, called at ctpd_nemo/a.py:1") -> Report:
    return Report(beat, at, "step 17", 61.0, line, waits, "node-2, process 7")


def test_the_rank_that_does_not_wait_is_the_one_that_is_waited_for() -> None:
    before = {rank: report(3, waits=rank != 3) for rank in range(5)}
    after = {rank: report(6, waits=rank != 3, line=f"line {rank}") for rank in range(5)}
    assert explain(before, after) == (
        "rank 3 (node-2, process 7) has not come beyond step 17 for 61 s: it is in line 3; "
        "waiting: rank 0 in line 0, rank 1 in line 1, rank 2 in line 2, rank 4 in line 4"
    )


def test_a_rank_that_is_not_heard_of_is_named_whatever_it_last_said() -> None:
    """It was stopped as it waited itself, like the others."""
    before = {0: report(3, True, at=105.0), 1: report(3, True, at=95.0), 2: None}
    after = {0: report(6, True, at=115.0), 1: report(3, True, at=95.0), 2: None}
    said = explain(before, after)
    assert "rank 1 (node-2, process 7) has not come beyond step 17 for 81 s, and was last heard of 20 s ago" in said
    assert "rank 2 has never been heard of" in said
    assert said.endswith("waiting: rank 0 in all_reduce, called at ctpd_nemo/a.py:1")


def test_ranks_that_all_wait_are_all_told_but_not_hundreds_of_them() -> None:
    before = {rank: report(3, True) for rank in range(512)}
    said = explain(before, {rank: report(6, True) for rank in range(512)})
    assert said.startswith("all ranks wait for each other: rank 0 in all_reduce")
    assert said.endswith("and 504 more")


def test_a_rank_knows_how_long_it_has_stood_and_that_a_loop_of_collectives_is_no_standing() -> None:
    initialize(ParallelConfig())
    stood: list[tuple[float, Standing]] = []
    looped: list[Standing] = []
    met, stands, loops = [0], threading.Event(), threading.Event()

    def watch() -> None:
        standstill = Standstill()
        while len(stood) < 5:
            looked_at, standing = time.monotonic(), standstill.look()
            if not standing.seconds:
                # It has moved since the last look.
                stood.clear()
            stood.append((looked_at, standing))
        stands.set()
        while len(looped) < 5:
            before = met[0]
            while met[0] < before + 2:
                time.sleep(0.001)
            looped.append(standstill.look())
        loops.set()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    stands.wait()
    # One and the same line over and over, as where ranks wait through the parts of another's work.
    while not loops.is_set():
        dist.barrier()
        met[0] += 1
    thread.join()
    assert stood[-1][1].seconds >= stood[-1][0] - stood[1][0] > 0
    assert not any(standing.waits for _, standing in stood)
    assert stood[-1][1].line.startswith("wait, ")
    assert [standing.seconds for standing in looped] == [0] * 5


@pytest.mark.parametrize("nccl", [b"", b"{}", b'{"entries": [{"pg_id": 0, "record_id": 7, "retired": true}]}'])
def test_collectives_of_every_recorder_of_torch_are_seen(monkeypatch: pytest.MonkeyPatch, nccl: bytes) -> None:
    """Torch that is built for CUDA has one for NCCL alone, whatever a job's backend is."""
    initialize(ParallelConfig())
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", lambda: nccl, raising=False)
    standstill = Standstill()
    stood = []
    for meets in (True, True, True, True, False):
        if meets:
            dist.barrier()
        stood.append(standstill.look().seconds)
    assert stood[:4] == [0, 0, 0, 0]
    assert stood[4] > 0


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpd_nemo.parallel.hang._ANSWER_SECONDS", 0.1)
    watch = HangWatch(dist.HashStore(), 0, 2, tmp_path, 60.0)
    release = threading.Event()
    assert watch._answer(release.wait) is None
    assert watch._answer(lambda: "an answer, while another is waited for") is None
    release.set()
    assert watch._asking is not None
    watch._asking.join()
    monkeypatch.setattr("ctpd_nemo.parallel.hang._ANSWER_SECONDS", 600.0)
    assert watch._answer(lambda: "now") == "now"
