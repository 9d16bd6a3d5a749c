"""Tools in interpreters of their own, as users start them: other tests run them in forks of one process."""

from pathlib import Path

import pytest

from tests.forks.client import TOOLS
from tests.pipeline.tool import run_tool


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("*.py")))
def test_a_tool_says_of_a_command_line_what_it_says_in_a_fork(tool: str, tmp_path: Path) -> None:
    """Nothing that has been imported before is missing, and nothing that imports print gets in the way."""
    fresh, forked = (run_tool(tool, ["no.such.key=1"], tmp_path, fresh=way) for way in (True, False))
    assert fresh == forked
    status, stdout, stderr = fresh
    assert (status, stdout) == (2, "")
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert "no.such.key" in line or "no" in line.split()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_processes_under_torchrun_itself(tmp_path: Path) -> None:
    status, _, stderr = run_tool("train.py", ["no.such.key=1"], tmp_path, processes=2, fresh=True)
    assert status == 1
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1
