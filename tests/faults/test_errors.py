"""Errors that no one foresaw, under ``torchrun``: one traceback on the terminal, all of them in files."""

from pathlib import Path

import pytest

from tests.faults.conftest import Zygote
from tests.faults.jobs import Job
from tests.pipeline.recipe import CONF
from tests.pipeline.tool import run_tool

TOOL = """
from ctpd_nemo.pipeline.entry import tool


@tool("train")
def main(config):
    import signal
    import time

    import torch.distributed as dist

    from ctpd_nemo.errors import InputError
    from ctpd_nemo.parallel.layout import ParallelConfig, initialize

    initialize(ParallelConfig())
    dist.barrier()
    if dist.get_rank() == config.get("late"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(2)
    if dist.get_rank() in config.failing:
        raise InputError("pairs.jsonl:17", "nonsense", "a pair") if config.foreseen else ValueError("a bug")
    dist.barrier()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A tool with a bug, beside the configs."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "conf").symlink_to(CONF)
    path = tmp_path / "tools" / "buggy.py"
    path.write_text(TOOL)
    return path


def arguments(failing: list[int], run_dir: Path, foreseen: bool = False) -> list[str]:
    return [f"run_dir={run_dir}", f"+failing={failing}", f"+foreseen={foreseen}"]


def check_terminal(told: str, failing: list[int], run_dir: Path) -> Path:
    """One traceback, with the rank; returns the file with all of it."""
    assert told.count("ValueError: a bug") == 1, told
    lines = told.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("rank "))
    rank = int(lines[first].split()[1])
    assert rank in failing
    assert lines[first + 1] == "Traceback (most recent call last):"
    assert told.count("Traceback") == 1
    file = run_dir / "logs" / f"error-rank-{rank}.txt"
    assert file.read_text().rstrip().endswith("ValueError: a bug")
    return file


@pytest.mark.parametrize("failing", [[0, 1], pytest.param([1], marks=pytest.mark.slow)])
def test_an_error_reaches_the_terminal_once_under_torchrun(failing: list[int], tool: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    status, stdout, stderr = run_tool(str(tool), arguments(failing, run_dir), tmp_path, processes=2, fresh=True)
    assert (status, stdout) == (1, "")
    # torchrun logs a line of its own, then comes its report, which names the error in a line, and where all of it is.
    ours, _, launcher = stderr.partition("torch/distributed/elastic")
    file = check_terminal(ours, failing, run_dir)
    assert f"ValueError: a bug; {file}" in launcher
    assert "To enable traceback see" not in launcher


def ended_by_themselves(statuses: list[int], failing: list[int], status: int) -> list[int]:
    """The ranks that failed before they were asked to stop, as the launcher does once one has failed."""
    failed = [rank for rank in failing if statuses[rank] == status]
    assert failed, statuses
    assert all(statuses[rank] == 0 for rank in failing if rank not in failed), statuses
    return failed


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_an_error_of_any_rank_reaches_the_terminal_once(
    failing: list[int], tool: Path, zygote: Zygote, tmp_path: Path
) -> None:
    job = Job(zygote, tmp_path, str(tool), arguments(failing, tmp_path / "run"), 2)
    failed = ended_by_themselves(job.run(fault={})[0], failing, 1)
    check_terminal(job.logs(), failing, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert files >= {f"error-rank-{rank}.txt" for rank in failed}


@pytest.mark.parametrize("failing", [[0, 1], [1]])
def test_bad_input_of_any_rank_is_all_that_is_told(
    failing: list[int], tool: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """But for a rank that waits for it, and is asked to stop."""
    job = Job(zygote, tmp_path, str(tool), arguments(failing, tmp_path / "run", foreseen=True), 2)
    ended_by_themselves(job.run(fault={})[0], failing, 2)
    told = [line for line in job.logs().splitlines() if line and not line.endswith("stopped by SIGTERM")]
    assert told == ["error: pairs.jsonl:17: found nonsense; expected a pair"]


def test_of_bad_input_that_a_rank_meets_after_the_first_has_ended_nothing_more_is_told(
    tool: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """The first keeps the store here, where ranks would count how many have ended."""
    late = [*arguments([0, 1], tmp_path / "run", foreseen=True), "+late=1"]
    job = Job(zygote, tmp_path, str(tool), late, 2)
    assert job.run(fault={})[0] == [2, 2]
    assert job.logs().strip() == "error: pairs.jsonl:17: found nonsense; expected a pair"
