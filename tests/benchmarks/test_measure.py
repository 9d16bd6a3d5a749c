"""What the benchmarks measure with: known times and sizes come out as they went in."""

import argparse
import json

import pytest
import torch
from measure import PeakMemory, Spread, in_fresh_process, ratio, seconds_in_turns
from report import Table, write_report

MIB = 2**20


def touch(mebibytes: int) -> int:
    """The peak beyond what was there, of a block that fills so much memory and lets go of it."""
    with PeakMemory() as memory:
        torch.ones(mebibytes, MIB, dtype=torch.uint8)
    return memory.beyond


def refuse() -> None:
    raise ValueError("as told")


@pytest.mark.parametrize("mebibytes", [64, 256])
def test_peak_memory_is_what_was_filled(mebibytes):
    assert in_fresh_process(touch, mebibytes) == pytest.approx(mebibytes * MIB, abs=8 * MIB)


def test_an_earlier_peak_does_not_count():
    touch(256)
    assert touch(64) < 80 * MIB


def test_an_error_in_the_other_process_arrives():
    with pytest.raises(ValueError, match="as told"):
        in_fresh_process(refuse)


def test_sides_take_turns_and_warm_up_does_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = seconds_in_turns(sides, turns=3, warmup=1)
    assert calls == list("abababab")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_turn_by_turn():
    # The machine is ten times slower in the second turn; the ratio is 2 in each.
    spread = ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1])
    assert (spread.median, spread.low, spread.high) == pytest.approx((2, 2, 2))
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(median=3, low=2, high=4, count=5)


def test_a_report_has_the_machine_the_command_and_every_measurement(tmp_path, capsys):
    arguments = argparse.Namespace(json=tmp_path / "out.json", markdown=tmp_path / "out.md", threads=1)
    table = Table("Widths.", ["side", "mm"], [["left", "1.5"]])
    write_report("Planks", [table], {"left": Spread.of([1.5])}, arguments)
    report = json.loads(arguments.json.read_text())
    assert report["results"] == {"left": {"median": 1.5, "low": 1.5, "high": 1.5, "count": 1}}
    # A package may leave out what torch says of its build behind the plus.
    assert report["machine"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["machine"]["command"].startswith("python ")
    text = arguments.markdown.read_text()
    assert "| side | mm |\n| --- | ---: |\n| left | 1.5 |" in text
    assert text == capsys.readouterr().out[:-1]
