"""Axes, thinning and labels of the charts."""

import re

import pytest

from distill.report.charts import Axis, Curve, axis_of, line_chart, scatter, thinned, value_text


def test_axis__is_logarithmic_where_values_span_a_factor_of_twenty() -> None:
    assert axis_of([1.0, 30.0], 0, 100, may_be_log=True).is_log
    assert not axis_of([1.0, 10.0], 0, 100, may_be_log=True).is_log
    assert not axis_of([0.0, 30.0], 0, 100, may_be_log=True).is_log
    assert not axis_of([1.0, 30.0], 0, 100, may_be_log=False).is_log
    assert Axis(1.0, 100.0, 0, 200, is_log=True).at(10.0) == pytest.approx(100.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 5e9])
def test_axis__of_equal_values_has_some_width(value: float) -> None:
    axis = axis_of([value, value], 0, 100, may_be_log=True)
    assert axis.low <= value <= axis.high and axis.low < axis.high
    assert 1 <= len(axis.ticks()) <= 12


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (5.1, 7.4), (-2.0, 9e6), (1e-9, 3e-9)])
def test_ticks__are_a_few_round_values(low: float, high: float) -> None:
    ticks = axis_of([low, high], 0, 100, may_be_log=False).ticks()
    assert 2 <= len(ticks) <= 7 and low - 1e-9 <= min(ticks) and max(ticks) <= high + 1e-9


def test_thinned__keeps_every_spike() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    few = thinned(points, 400)
    assert len(few) <= 400 and (4321.0, 99.0) in few and few == sorted(few)
    assert thinned(points[:10], 400) == points[:10]


def test_line_chart__leaves_out_what_is_not_finite() -> None:
    nothing = Curve("a", "#000", "", [(1.0, float("nan")), (2.0, float("inf"))])
    assert line_chart("loss", [nothing]) is None
    chart = line_chart("loss", [nothing, Curve("b", "#000", "", [(1.0, 2.0)])])
    assert chart is not None and "circle" in chart.text and "nan" not in chart.text


def test_scatter__has_no_label_on_another_or_outside() -> None:
    points = {f"a long name {index}": (1000.0 + index, 0.5, "#000") for index in range(6)}
    chart = scatter("score", "parameters", points)
    assert chart is not None
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start">a long', chart.text)
    places = {(float(x), float(y)) for x, y in found}
    assert len(places) == 6 and all(x + 13 * 6 <= 560 for x, _ in places)
    assert scatter("score", "parameters", {}) is None


def test_value_text__is_short() -> None:
    texts = [value_text(value) for value in (0.12345, 6512, 21_000_000, 355_000, 7.1e9)]
    assert texts == ["0.123", "6,512", "21M", "355k", "7.1G"]
