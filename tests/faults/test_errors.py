"""Errors that no one foresaw, under ``torchrun``: one traceback on the terminal, all of them in files."""

from pathlib import Path

import pytest

from tests.pipeline.tool import _ROOT, run_tool

TOOL = """
import os

from ctpd_nemo.pipeline.entry import tool


@tool("train")
def main(config):
    import torch.distributed as dist

    from ctpd_nemo.errors import InputError
    from ctpd_nemo.parallel.layout import ParallelConfig, initialize

    initialize(ParallelConfig())
    dist.barrier()
    if os.environ["RANK"] in os.environ["FAILING"]:
        if os.environ.get("INPUT"):
            raise InputError("pairs.jsonl:17", "nonsense", "a pair")
        raise ValueError("a bug")
    dist.barrier()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """A tool with a bug, beside the configs."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "conf").symlink_to(_ROOT / "conf")
    path = tmp_path / "tools" / "buggy.py"
    path.write_text(TOOL)
    return path


@pytest.mark.parametrize("failing", ["0 1", "1"])
def test_an_error_reaches_the_terminal_once(
    failing: str, tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", failing)
    status, stdout, stderr = run_tool(str(tool), [f"run_dir={tmp_path / 'run'}"], tmp_path, processes=2)
    assert (status, stdout) == (1, "")
    ours, _, launcher = stderr.partition("ChildFailedError")
    assert ours.count("ValueError: a bug") == 1, stderr
    told = ours.splitlines()
    first = told.index(next(line for line in told if line.startswith("rank ")))
    rank = int(told[first].split()[1])
    assert str(rank) in failing
    assert told[first + 1] == "Traceback (most recent call last):"
    # What torchrun adds names the error in a line, and where all of it is.
    file = tmp_path / "run" / "logs" / f"error-rank-{rank}.txt"
    assert f"ValueError: a bug; {file}" in launcher
    assert "To enable traceback see" not in launcher
    assert file.read_text().rstrip().endswith("ValueError: a bug")
    if failing == "0 1":
        other = (tmp_path / "run" / "logs" / f"error-rank-{1 - rank}.txt").read_text()
        assert "Traceback" in other
