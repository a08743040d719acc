"""Small charts as inline SVG, drawn for a column as narrow as a phone.

The report, a batch's page and the studio show them; a chart needs no script, no font and no file beside it. Colours
are dark enough to be read as text on white, since lines are named where they end and not in a legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 70, 24, 38
_FLOOR = HEIGHT - _BOTTOM
_LABEL_GAP = 13
_MAX_MARKED = 6  # up to this many values get a dot and a number on the x axis each
_INK, _GRID = "#333", "#e4e4e0"
COLORS = ("#9a4d00", "#b3155f", "#6d35c9", "#1d5fd0", "#0b6b61")
GREY = "#767676"

Scale = Callable[[float], float]
"""From a value to a coordinate."""


@dataclass(frozen=True)
class Line:
    """One line of a chart, named where it ends."""

    label: str
    values: Sequence[float | None]  # one per place on the x axis; the line passes over None
    color: str
    width: float = 2.0  # of the stroke, in px


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart, with a label beside it; the joined ones are filled, with a dashed line through."""

    label: str
    x: float
    y: float
    color: str
    joined: bool = False


def line_chart(lines: Sequence[Line], x: Sequence[int], *, x_name: str, y_name: str, log: bool = False) -> Markup:
    """Lines over whole numbers such as steps or epochs, the last on top.

    Args:
        x: Positions of the values, ascending.
        log: Whether the y axis is logarithmic; all values must then be above 0. Otherwise the axis includes 0.

    Returns:
        The chart, or an empty string if there is no value.
    """
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        low, high = (min(low, 0.0), max(high, 0.0)) if low or high else (0.0, 1.0)
    right = WIDTH - _RIGHT
    at_x, at_y = _scale(x[0], max(x[-1], x[0] + 1), _LEFT, right), _scale(low, high, _FLOOR, _TOP, log=log)
    marks = x if len(x) <= _MAX_MARKED else [mark for mark in ticks(x[0], x[-1]) if mark >= x[0] and mark == int(mark)]
    parts = _y_axis(log_ticks(low, high) if log else ticks(low, high), at_y, y_name, right)
    parts += _x_axis([(at_x(mark), f"{mark:g}") for mark in marks], x_name, right)
    ends: list[tuple[float, Line]] = []
    for line in lines:
        points = [(at_x(at), at_y(value)) for at, value in zip(x, line.values, strict=True) if value is not None]
        if points:
            parts.append(_polyline(points, stroke=line.color, stroke_width=line.width))
            if len(points) <= _MAX_MARKED:
                parts += [_element("circle", cx=x, cy=y, r=2.6, fill=line.color) for x, y in points]
            ends.append((points[-1][1], line))
    for y, (_, line) in zip(spread([end[0] for end in ends]), ends, strict=True):
        parts.append(_text(right + 7, y + 4, line.label, color=line.color))
    return _svg(parts, x_name, y_name)


def bar_chart(counts: Sequence[int], marks: Sequence[int], *, x_name: str, y_name: str) -> Markup:
    """A histogram over an axis of equal bins, with marks at equal distances from its beginning to its end."""
    right, high = WIDTH - 16, max([*counts, 1])
    width = (right - _LEFT) / len(counts)
    at_y, at_mark = _scale(0, high, _FLOOR, _TOP), _scale(0, len(marks) - 1, _LEFT, right)
    parts = _y_axis([tick for tick in ticks(0, high) if tick == int(tick)], at_y, y_name, right)
    for index, count in enumerate(counts):
        x, y = _LEFT + index * width + 0.75, at_y(count)
        tooltip = _element("title", str(count))
        parts.append(_element("rect", tooltip, x=x, y=y, width=width - 1.5, height=_FLOOR - y, fill=COLORS[3]))
    parts += _x_axis([(at_mark(index), str(mark)) for index, mark in enumerate(marks)], x_name, right)
    return _svg(parts, x_name, y_name)


def scatter_chart(points: Sequence[Point], *, x_name: str, y_name: str) -> Markup:
    """One point or more with their labels, and a line through those that are joined, from left to right."""
    right = WIDTH - 24
    left_value, right_value = _padded([point.x for point in points])
    low, high = _padded([point.y for point in points])
    at_x, at_y = _scale(left_value, right_value, _LEFT, right), _scale(low, high, _FLOOR, _TOP)
    marks = ticks(left_value, right_value)
    parts = _y_axis(ticks(low, high), at_y, y_name, right)
    parts += _x_axis([(at_x(mark), f"{mark:g}") for mark in marks[:: 1 + len(marks) // 6]], x_name, right)
    joined = [(at_x(p.x), at_y(p.y)) for p in sorted(points, key=lambda p: (p.x, -p.y)) if p.joined]
    if len(joined) > 1:
        parts.append(_polyline(joined, stroke=GREY, stroke_dasharray="4 3"))
    dots = [(at_x(point.x), at_y(point.y)) for point in points]
    for point, (x, y) in zip(points, dots, strict=True):
        fill = point.color if point.joined else "#fff"
        parts.append(_element("circle", cx=x, cy=y, r=4.5, fill=fill, stroke=point.color, stroke_width=2))
    for point, (x, y) in zip(points, _beside(dots), strict=True):
        parts.append(_text(x, y, point.label, anchor="middle", color=point.color))
    return _svg(parts, x_name, y_name)


def _beside(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places for labels: the first corner of each point that no label has taken."""
    taken: list[tuple[float, float]] = []
    for x, y in points:
        corners = [(x + 11, y - 6), (x - 11, y - 6), (x + 11, y + 14), (x - 11, y + 14)]
        free = [c for c in corners if all(abs(c[0] - t[0]) > 14 or abs(c[1] - t[1]) > _LABEL_GAP for t in taken)]
        taken.append((free or corners)[0])
    return taken


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with a margin beyond the lowest and the highest value."""
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], 3 to 7 of them, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5 or 1.0
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for a logarithmic axis: at most 7, evenly spaced if the axis is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [float(f"{f * 10.0**p:.10g}") for p in powers for f in factors if low <= f * 10.0**p <= high]
        if 3 <= len(found) <= 7:
            return found
    return ticks(low, high)


def spread(wanted: Sequence[float]) -> list[float]:
    """Heights of labels near the wanted ones, at least a line of text apart and inside the chart."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = -math.inf
    for index in order:
        placed[index] = floor = max(wanted[index], floor + _LABEL_GAP)
    ceiling = float(_FLOOR)
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LABEL_GAP
    return placed


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Scale:
    """Maps [low, high] to [start, end]."""

    def at(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return start + share * (end - start)

    return at


def _y_axis(marks: Sequence[float], at_y: Scale, name: str, right: float) -> list[Markup]:
    parts = [_text(4, 12, name)]
    for mark in marks:
        y = at_y(mark)
        parts.append(_element("line", x1=_LEFT, x2=right, y1=y, y2=y, stroke="#999" if mark == 0 else _GRID))
        parts.append(_text(_LEFT - 6, y + 4, f"{mark:g}", anchor="end"))
    return parts


def _x_axis(marks: Sequence[tuple[float, str]], name: str, right: float) -> list[Markup]:
    labels = [_text(x, _FLOOR + 16, label, anchor="middle") for x, label in marks]
    return [*labels, _text((_LEFT + right) / 2, HEIGHT - 5, name, anchor="middle")]


def _polyline(points: Sequence[tuple[float, float]], **attributes: float | str) -> Markup:
    return _element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none", **attributes)


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = _INK) -> Markup:
    return _element("text", text, x=x, y=y, text_anchor=anchor, fill=color)


def _svg(parts: Sequence[Markup], x_name: str, y_name: str) -> Markup:
    return _element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{y_name} by {x_name}",
        font_family="system-ui, sans-serif", font_size=12,
    )  # fmt: skip


def _element(name: str, *children: str, **attributes: float | str) -> Markup:
    """An SVG element; whatever is not markup already is escaped, here and nowhere else."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))
