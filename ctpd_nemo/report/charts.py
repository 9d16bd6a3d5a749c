"""Curves and histograms as geometry: what a template draws as SVG, and the numbers that pointing at it shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ctpd_nemo.losses.histogram import EDGES
from ctpd_nemo.report.metric_log import MetricTable

WIDTH, HEIGHT = 380, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 22
# More points than this are drawn as means over as many steps, with the range around them.
_MOST_POINTS = 200
_MOST_COLUMNS = 60
# The lower edges of all bins, as a log names them.
_EDGES = [float(f"{edge:.3g}") for edge in (-math.inf, *EDGES)]

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric.

    Attributes:
        name: As in the log.
        lines: SVG paths, one for each stretch without a gap.
        ranges: SVG paths around them, from the least to the most of the steps that were drawn as one point.
        dots: Points that stand alone.
        points: For each point: x, steps and value, as they are shown.
    """

    name: str
    lines: list[str]
    ranges: list[str]
    dots: list[tuple[float, float]]
    points: list[tuple[float, str, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves on one pair of axes; ticks are positions with labels."""

    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    @property
    def points(self) -> list[tuple[str, list[tuple[float, str, str]]]]:
        """Names and points of the curves, for pointing at."""
        return [(curve.name, curve.points) for curve in self.curves]


@dataclass(frozen=True, slots=True)
class Histogram:
    """How weights are spread, step by step.

    Attributes:
        title: Whose weights.
        cells: x, y, width, height and shade of every bin that is not empty; a shade is the root of the bin's share of
            the spans of these steps, so that small ones are seen.
        columns: For each column of cells: x, steps, and its bins with their shares, as they are shown.
        x_ticks: Positions with labels.
        y_ticks: The edges of the bins.
    """

    title: str
    cells: list[tuple[float, float, float, float, float]]
    columns: list[tuple[float, str, list[tuple[str, str]]]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to positions."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 1)


def chart(title: str, metrics: Mapping[str, Points]) -> Chart | None:
    """Draw some metrics over steps; ``None`` where there is nothing to draw."""
    known = {name: points for name, points in metrics.items() if points}
    if not known:
        return None
    steps = [step for points in known.values() for step, _ in points]
    values = [value for points in known.values() for _, value in points]
    x, y = _step_axis(min(steps), max(steps)), _value_axis(min(values), max(values))
    curves = [_curve(name, points, x, y) for name, points in known.items()]
    y_ticks = [(y(tick), number(tick)) for tick in _ticks(y.low, y.high)]
    return Chart(title, curves, _step_ticks(x), y_ticks)


def weight_histograms(table: MetricTable) -> list[Histogram]:
    """The spread of span weights over the steps, of chosen and of rejected responses."""
    found = []
    for side in ("chosen", "rejected"):
        by_step = {step: sides[side] for step, sides in table.weights.items() if side in sides}
        if by_step:
            found.append(_histogram(f"span weights, {side}", by_step))
    return found


def number(value: float) -> str:
    """A number in at most four digits that matter."""
    if value == 0:
        return "0"
    if 1e3 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _curve(name: str, points: Points, x: _Axis, y: _Axis) -> Curve:
    size = -(-len(points) // _MOST_POINTS)
    curve = Curve(name, [], [], [], [])
    for stretch in _stretches(points):
        buckets = [stretch[at : at + size] for at in range(0, len(stretch), size)]
        means, lows, highs = [], [], []
        for bucket in buckets:
            values = [value for _, value in bucket]
            first, last = bucket[0][0], bucket[-1][0]
            at, mean = x((first + last) / 2), math.fsum(value / len(values) for value in values)
            means.append((at, y(mean)))
            lows.append((at, y(min(values))))
            highs.append((at, y(max(values))))
            curve.points.append((at, _steps(first, last), number(mean)))
        if len(means) == 1:
            curve.dots.append(means[0])
        else:
            curve.lines.append(_path(means))
        if size > 1 and len(means) > 1:
            curve.ranges.append(_path(highs + lows[::-1]) + "Z")
    return curve


def _stretches(points: Points) -> list[Points]:
    """The points between gaps: where more steps are left out than is usual for this metric."""
    strides = [after - before for (before, _), (after, _) in pairwise(points)]
    usual = median(strides) if strides else 1
    cuts = [index + 1 for index, stride in enumerate(strides) if stride > 1.5 * usual]
    return [points[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(points)], strict=True)]


def _histogram(title: str, by_step: Mapping[int, Mapping[float, int]]) -> Histogram:
    steps = list(by_step)
    edges, end = _bins({edge for counts in by_step.values() for edge in counts})
    size = -(-len(steps) // _MOST_COLUMNS)
    columns = [steps[at : at + size] for at in range(0, len(steps), size)]
    width = (WIDTH - _LEFT - _RIGHT) / len(columns)
    height = min(24.0, (HEIGHT - _TOP - _BOTTOM) / len(edges))
    bottom = HEIGHT - _BOTTOM
    cells, shown = [], []
    for index, column in enumerate(columns):
        left = _LEFT + index * width
        counts = {edge: sum(by_step[step].get(edge, 0) for step in column) for edge in edges}
        total = sum(counts.values())
        bins = []
        for row, (edge, count) in enumerate(counts.items()):
            if count:
                share, top = count / total, bottom - (row + 1) * height
                cells.append((round(left, 2), round(top, 2), round(width, 2), round(height, 2), round(share**0.5, 3)))
                bins.append((_from(edge), f"{share:.1%}"))
        shown.append((round(left + width / 2, 1), _steps(column[0], column[-1]), bins[::-1]))
    places = sorted({0, len(columns) // 2, len(columns) - 1})
    x_ticks = [(shown[place][0], str(columns[place][0])) for place in places]
    y_ticks = [(round(bottom - row * height, 1), _edge(edge)) for row, edge in enumerate([*edges, *end])]
    return Histogram(title, cells, shown, x_ticks, y_ticks)


def _bins(found: set[float]) -> tuple[list[float], list[float]]:
    """The lower edges of all bins from the first to the last that was found, and where that one ends, if it does.

    A bin that no span is in has its row too: without it, the one below would seem to reach to the one above.
    """
    if not found <= set(_EDGES):
        return sorted(found), []
    first, behind = _EDGES.index(min(found)), _EDGES.index(max(found)) + 1
    return _EDGES[first:behind], _EDGES[behind : behind + 1]


def _edge(edge: float) -> str:
    return "below" if edge == -math.inf else number(edge)


def _from(edge: float) -> str:
    return "below the others" if edge == -math.inf else f"from {number(edge)}"


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _step_axis(low: float, high: float) -> _Axis:
    if low == high:
        low, high = low - 1, high + 1
    return _Axis(low, high, _LEFT, WIDTH - _RIGHT)


def _value_axis(low: float, high: float) -> _Axis:
    # Numbers of opposite ends of the range of floats have no finite distance, and the smallest no power of ten.
    low, high = (min(max(value, -1e300), 1e300) for value in (low, high))
    room = max((high - low) * 0.05 or abs(high) * 0.1 or 1.0, 1e-300)
    return _Axis(low - room, high + room, HEIGHT - _BOTTOM, _TOP)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a range."""
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(round_step for factor in (1, 2, 2.5, 5, 10) if (round_step := factor * magnitude) >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]


def _step_ticks(axis: _Axis) -> list[tuple[float, str]]:
    ticks = [tick for tick in _ticks(axis.low, axis.high) if tick == int(tick)]
    return [(axis(tick), number(tick)) for tick in ticks if axis(tick) <= WIDTH - _RIGHT]
