"""A dataloader worker that has died ends a job with one line, and the status of a job that may be started again."""

from pathlib import Path

import pytest

from ctpd_nemo.errors import WorkerDiedError
from ctpd_nemo.pipeline.failures import fail

LINE = "dataloader worker 1 (process 4711) was killed by SIGKILL"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_that_has_died_is_told_in_one_line(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    try:
        raise WorkerDiedError(LINE)
    except WorkerDiedError as error:
        fail(error, str(tmp_path))
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("rank ", "other ranks"))]
    assert told == [f"error: {LINE}"]
