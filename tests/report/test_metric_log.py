"""Metric logs as crashes and resumed runs leave them."""

import json
from pathlib import Path

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.report.metric_log import read_metrics


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_come_by_step_with_what_was_held_out(log: Path) -> None:
    log.write_text('{"step": 2, "loss": 0.5}\n{"step": 1, "loss": 1}\n{"step": 2, "val_loss": 0.7}\n')
    table = read_metrics(log)
    assert table.rows == {1: {"loss": 1.0}, 2: {"loss": 0.5, "val_loss": 0.7}}
    assert list(table.rows) == [1, 2]
    assert table.series("val_loss") == [(2, 0.7)]
    assert table.names() == ["loss", "val_loss"]
    assert table.notes == []


@pytest.mark.parametrize("lost", range(1, 24))
def test_a_last_line_that_was_cut_off_costs_nothing_but_itself(log: Path, lost: int) -> None:
    text = '{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}'
    log.write_text(text[:-lost])
    table = read_metrics(log)
    assert table.rows == {1: {"loss": 1.0}}
    assert table.notes == ["the last line is cut off"]


def test_a_last_line_without_its_end_is_read(log: Path) -> None:
    log.write_text('{"step": 1, "loss": 1}')
    assert read_metrics(log).rows == {1: {"loss": 1.0}}


def test_steps_that_were_done_again_count_once_and_the_last_time(log: Path) -> None:
    rows = [{"step": step, "loss": float(turn)} for turn, steps in enumerate([(1, 2, 3), (2, 3, 4)]) for step in steps]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_metrics(log)
    assert table.series("loss") == [(1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert table.notes == ["2 rows of steps that were done again: the last of each counts"]


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", "{}", '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": 1e400}', "[" * 10**5]
)
def test_lines_that_cannot_be_read_are_counted(log: Path, line: str) -> None:
    log.write_text(f'{line}\n\n{{"step": 1, "loss": 1}}\n')
    table = read_metrics(log)
    assert table.rows == {1: {"loss": 1.0}}
    assert table.notes == ["1 lines that cannot be read"]


def test_bytes_that_are_no_text_are_read_around(log: Path) -> None:
    log.write_bytes(b'\xff\x00\n{"step": 1, "loss": 1}\n')
    assert read_metrics(log).rows == {1: {"loss": 1.0}}


def test_values_that_are_no_number_leave_gaps(log: Path) -> None:
    log.write_text(
        '{"step": 1, "loss": NaN, "a": Infinity, "b": null, "c": "x", "d": true, "e": 2}\n'
        f'{{"step": 2, "loss": 1{"0" * 400}}}\n'
    )
    table = read_metrics(log)
    assert table.rows == {1: {"e": 2.0}, 2: {}}
    assert table.notes == ["6 values that are no finite number"]


def test_weights_are_counts_by_edge(log: Path) -> None:
    log.write_text(
        '{"step": 3, "weights": {"chosen": {"-inf": 1, "0.5": 2, "x": 3, "1": -1, "2": "a"}, "rejected": []}}\n'
    )
    assert read_metrics(log).weights == {3: {"chosen": {float("-inf"): 1, 0.5: 2}}}


def test_no_log_is_an_empty_one(log: Path) -> None:
    assert read_metrics(log).rows == {}
    log.mkdir()
    with pytest.raises(InputError, match="found a folder"):
        read_metrics(log)
