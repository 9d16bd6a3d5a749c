"""Curves and histograms: geometry against arithmetic done here."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.report.charts import HEIGHT, WIDTH, chart, number, weight_histograms
from ctpd_nemo.report.metric_log import MetricTable


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+?) (\S+?)(?=[LZ]|$)", path)]


def test_a_line_goes_through_its_points() -> None:
    drawn = chart("loss", {"loss": [(0, 0.0), (5, 1.0), (10, 0.5)]})
    assert drawn is not None
    (curve,) = drawn.curves
    (left, low), (middle, high), (right, half) = coordinates(curve.lines[0])
    assert middle == pytest.approx((left + right) / 2, abs=0.2)
    assert high < half < low, "upwards is less in SVG"
    assert half == pytest.approx((low + high) / 2, abs=0.2)
    assert [(steps, value) for _, steps, value in curve.points] == [
        ("step 0", "0"),
        ("step 5", "1"),
        ("step 10", "0.5"),
    ]
    assert curve.ranges == []


def test_ticks_stand_where_their_labels_say() -> None:
    drawn = chart("loss", {"loss": [(0, 0.0), (100, 4.0)]})
    assert drawn is not None
    (left, low), (right, high) = coordinates(drawn.curves[0].lines[0])
    for y, label in drawn.y_ticks:
        assert y == pytest.approx(low + float(label) / 4 * (high - low), abs=0.2)
    for x, label in drawn.x_ticks:
        assert x == pytest.approx(left + float(label) / 100 * (right - left), abs=0.2)
    assert len(drawn.y_ticks) >= 3


def test_lines_are_broken_at_gaps() -> None:
    steps = [1, 2, 3, 7, 8, 20]
    drawn = chart("loss", {"loss": [(step, float(step)) for step in steps]})
    assert drawn is not None
    (curve,) = drawn.curves
    assert [len(coordinates(path)) for path in curve.lines] == [3, 2]
    assert len(curve.dots) == 1
    assert [steps for _, steps, _ in curve.points] == [f"step {step}" for step in steps]


def test_a_metric_of_every_tenth_step_has_no_gaps() -> None:
    drawn = chart("loss", {"loss": [(s, 1.0) for s in range(1, 41)], "val_loss": [(s, 2.0) for s in range(10, 41, 10)]})
    assert drawn is not None
    assert [len(curve.lines) for curve in drawn.curves] == [1, 1]


def test_many_points_are_means_with_their_range() -> None:
    values = [float(step % 2) for step in range(10_000)]
    drawn = chart("loss", {"loss": list(enumerate(values))})
    assert drawn is not None
    (curve,) = drawn.curves
    assert len(curve.points) == 200
    assert {value for *_, value in curve.points} == {"0.5"}
    assert curve.points[0][1] == "steps 0 to 49"
    edges = coordinates(curve.ranges[0])
    assert len({y for _, y in edges}) == 2
    assert len(edges) == 400


@given(
    st.lists(
        st.tuples(st.integers(0, 2**53 - 1), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=30
    )
)
def test_every_number_finds_a_place_in_the_picture(points: list[tuple[int, float]]) -> None:
    drawn = chart("any", {"any": sorted(dict(points).items())})
    assert drawn is not None
    (curve,) = drawn.curves
    places = [*curve.dots, *(place for path in curve.lines for place in coordinates(path))]
    assert len(places) == len(dict(points))
    for x, y in places:
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("loss", {}) is None
    assert chart("loss", {"loss": []}) is None


def test_a_histogram_has_a_column_a_step_and_a_cell_a_bin() -> None:
    table = MetricTable(weights={1: {"chosen": {0.5: 1, 1.0: 3}}, 2: {"chosen": {1.0: 8}}})
    (drawn,) = weight_histograms(table)
    assert [(steps, bins) for _, steps, bins in drawn.columns] == [
        ("step 1", [("from 1", "75.0%"), ("from 0.5", "25.0%")]),
        ("step 2", [("from 1", "100.0%")]),
    ]
    assert [cell[4] for cell in drawn.cells] == [round(share**0.5, 3) for share in (0.25, 0.75, 1.0)]
    # No span is in the bin between them, which has its row all the same; 1.41 is where the last one ends.
    assert [label for _, label in drawn.y_ticks] == ["0.5", "0.707", "1", "1.41"]
    rows = [y for y, _ in drawn.y_ticks]
    assert [cell[1] + cell[3] for cell in drawn.cells] == pytest.approx([rows[0], rows[2], rows[2]])
    (x, y, width, height, _), *_, last = drawn.cells
    assert last[0] == pytest.approx(x + width)
    assert y + height == pytest.approx(HEIGHT - 22)


def test_a_histogram_of_many_steps_joins_them() -> None:
    table = MetricTable(weights={step: {"rejected": {1.0: 1}} for step in range(600)})
    (drawn,) = weight_histograms(table)
    assert len(drawn.columns) == 60
    assert drawn.columns[0][1] == "steps 0 to 9"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.5, "0.5"), (1234.4, "1,234"), (1e-7, "1e-07"), (-12.3456, "-12.35"), (2e20, "2e+20")],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown
