"""JSON lines of a run, on file systems and in files that are not as they should be."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.pipeline.step_rows import StepRows


def test_rows_that_cannot_be_written_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is not even a file to begin with: a disk without room for its name, or a folder that is gone."""
    log = StepRows(tmp_path / "run/metrics.jsonl")
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        log.append({"step": 1})
        log.append({"step": 2})
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "1 rows wait to be written",
        "2 rows wait to be written",
    ]
    log.path.parent.mkdir()
    log.append({"step": 3})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage",
    [
        *(b"1\n", b"null\n", b"[]\n", b"{}\n", b'{"step": "2"}\n', b'{"step": true}\n'),
        *(b"\0" * 5000 + b"\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"step": 2, "lo'),
    ],
    ids=lambda damage: repr(damage[:8]),
)
def test_lines_that_are_no_rows_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    log = StepRows(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    with log.path.open("ab") as file:
        file.write(damage)
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        last: Any = log.cut_back(lambda row: row["step"] <= 1)
    assert last == {"step": 1}
    assert log.path.read_text() == '{"step": 1}\n'
    (told,) = (record.getMessage() for record in caplog.records)
    assert "no whole row" in told
    assert told.isprintable()
    assert len(told) < len(str(log.path)) + 120
