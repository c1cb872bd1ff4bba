"""Curves, bars and points as inline SVG: they print, scale and load nothing.

A curve has a colour per network and a dash per run, so that curves differ on paper without colours too.
The script of the page finds the values under the mouse in the points themselves: an axis stands in ``data-*``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.report.markup import Content, Html, element

# dark enough for paper, and apart without a sense of red and green (after Okabe and Ito)
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b0468c",
    "#a87400",
    "#2f94cf",
    "#6a3fb5",
    "#7d4519",
    "#b3202a",
)
TEACHER_COLOUR = "#444444"
DASHES = ("", "6 3", "2 2", "8 2 2 2", "1 3")
WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 24, 30  # around the area of the curves
MOST_POINTS = 40_000  # of all curves of a page
LEAST_POINTS, USUAL_POINTS = 40, 400  # of a curve
LETTER_WIDTH = 6.0  # of a name beside a point, about
LOG_RATIO = 20.0  # between the largest and the smallest value, from which a log axis shows more


@dataclass(frozen=True)
class Curve:
    """One network of one run."""

    name: str
    colour: str
    dash: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on a line from ``start`` to ``end`` pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (
            (math.log10(x) if self.is_log else x) for x in (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """A few round values."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 3 else (1,)
            every = max(1, len(decades) // 6)
            values = [step * 10.0**decade for decade in decades[::every] for step in steps]
        else:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            count = math.floor((self.high - first * step) / step + 1e-9) + 1
            values = [(first + index) * step for index in range(count)]
        slack = 1e-9 * (self.high - self.low)
        return [value for value in values if self.low - slack <= value <= self.high + slack]


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return scale * next(factor for factor in (1, 2, 2.5, 5, 10) if step <= factor * scale * 1.0001)


def axis_of(values: Sequence[float], start: float, end: float, *, may_be_log: bool) -> Axis:
    """An axis that holds all values, each finite."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_RATIO:
        return Axis(low, high, start, end, is_log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        margin = abs(high) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    return Axis(low, high, start, end)


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about ``most`` points: of each equal run the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    cells = max(1, most // 2)
    found = []
    for index in range(cells):
        run = points[index * len(points) // cells : (index + 1) * len(points) // cells]
        found += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return found


def line_chart(
    title: str, curves: Sequence[Curve], *, may_be_log: bool = True, x_label: str = "step"
) -> Html | None:
    """Curves over steps, or over what ``x_label`` names; None where no value is finite."""
    finite = [
        (curve, [p for p in curve.points if math.isfinite(p[0]) and math.isfinite(p[1])])
        for curve in curves
    ]
    finite = [(curve, points) for curve, points in finite if points]
    if not finite:
        return None
    everything = [point for _, points in finite for point in points]
    x = axis_of([p[0] for p in everything], LEFT, WIDTH - RIGHT, may_be_log=False)
    y = axis_of([p[1] for p in everything], HEIGHT - BOTTOM, TOP, may_be_log=may_be_log)
    parts = [*_frame(title + (" (log)" if y.is_log else ""), x, y, x_label=x_label)]
    for curve, points in finite:
        pixels = " ".join(f"{x.at(a):.1f},{y.at(b):.2f}" for a, b in points)
        look: dict[str, Content] = {"stroke": curve.colour, "stroke_dasharray": curve.dash or None}
        if len(points) == 1:
            parts.append(_dot(x.at(points[0][0]), y.at(points[0][1]), curve.colour))
        parts.append(element("polyline", points=pixels, fill="none", data_name=curve.name, **look))
    scale = {
        "data_x": f"{x.low!r} {x.high!r} {x.start} {x.end}",
        "data_y": f"{y.low!r} {y.high!r} {y.start} {y.end} {int(y.is_log)}",
    }
    return _svg(WIDTH, HEIGHT, title, parts, **scale)


def scatter(
    title: str, x_label: str, points: Mapping[str, tuple[float, float, str]]
) -> Html | None:
    """Points with their names beside them: each has a value, a score and a colour. None without points."""
    if not points:
        return None
    x = axis_of([p[0] for p in points.values()], LEFT + 30, WIDTH - 90, may_be_log=True)
    y = axis_of([p[1] for p in points.values()], HEIGHT - BOTTOM - 10, TOP + 10, may_be_log=False)
    parts = [*_frame(title, x, y, x_label=x_label + (" (log)" if x.is_log else ""))]
    taken: list[Box] = []
    for name, (value, score, colour) in points.items():
        across, down = x.at(value), y.at(score)
        parts += [_dot(across, down, colour), _label(name, across, down, taken)]
    return _svg(WIDTH, HEIGHT, title, parts)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _label(name: str, across: float, down: float, taken: list[Box]) -> Html:
    """A name beside its point: the first free position, which is then taken."""
    width = LETTER_WIDTH * len(name)
    options = [
        (across + side if side > 0 else across + side - width, down + drop)
        for drop in (-5, 12, -17, 24, -29, 36)
        for side in (6, -6)
    ]
    inside = [(left, top) for left, top in options if left >= LEFT and left + width <= WIDTH]
    boxes = [(left, top - 10, left + width, top + 2) for left, top in inside or options[:1]]
    box = next((b for b in boxes if not any(_overlap(b, other) for other in taken)), boxes[0])
    taken.append(box)
    return _text(box[0], box[3] - 2, name, "start")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Html:
    """A row of parts after each other, each with a name, a length and a colour; the longest row fills the width."""
    left, height = 110, 20
    longest = max((sum(length for _, length, _ in row) for _, row in rows), default=0.0) or 1.0
    scale = (WIDTH - left - RIGHT) / longest
    parts = []
    for index, (name, row) in enumerate(rows):
        top, start = 8 + index * height, float(left)
        parts.append(_text(left - 6, top + 12, name, "end"))
        rest = WIDTH - left - RIGHT
        parts.append(element("rect", x=left, y=top, width=rest, height=15, class_="idle"))
        for part, length, colour in row:
            title_of_part = element("title", f"{part}: {length / longest:.0%} of the step")
            width = f"{length * scale:.2f}"
            look: dict[str, Content] = {"x": f"{start:.2f}", "y": top, "width": width}
            look |= {"height": 15, "fill": colour}
            parts.append(element("rect", title_of_part, stroke="#fff", **look))
            start += length * scale
    return _svg(WIDTH, 12 + len(rows) * height, title, parts)


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """Name, colour and dash of each curve."""
    marks = []
    for name, colour, dash in entries:
        look: dict[str, Content] = {
            "stroke": colour,
            "stroke_width": 3,
            "stroke_dasharray": dash or None,
        }
        line = element("line", x1=0, y1=6, x2=26, y2=6, **look)
        mark = element("svg", line, width=26, height=12, viewBox="0 0 26 12", aria_hidden="true")
        marks.append(element("span", mark, name))
    return element("p", *marks, class_="legend")


def value_text(value: float) -> str:
    """Three digits; thousands and millions short."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _frame(title: str, x: Axis, y: Axis, *, x_label: str = "step") -> list[Html]:
    parts = [element("text", title, x=LEFT, y=14, class_="title")]
    for value in y.ticks():
        here = f"{y.at(value):.1f}"
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=here, y2=here, class_="grid"))
        parts.append(_text(LEFT - 5, y.at(value) + 4, value_text(value), "end"))
    for value in x.ticks():
        parts.append(_text(x.at(value), HEIGHT - BOTTOM + 15, value_text(value), "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_label, "end"))
    return parts


def _dot(x: float, y: float, colour: str) -> Html:
    return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, fill=colour)


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _svg(width: int, height: int, label: str, parts: Sequence[Html], **attributes: str) -> Html:
    box = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria_label": label}
    return element("svg", *parts, **box, **attributes, class_="chart")
