"""Small charts as inline SVG, drawn for a column as narrow as a phone.

A chart is one string; it needs no script, no font and no file beside it. Colours are dark enough to be read
as text on white, since lines are named where they end and not in a legend.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 62, 24, 38
_LABEL_GAP = 13
_MOST_MARKED = 6  # as many values as this get a dot and a number on the x axis each
_INK, _GRID = "#333", "#e4e4e0"
COLORS = ("#9a4d00", "#b3155f", "#6d35c9", "#1d5fd0", "#0b6b61")


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Written where the line ends.
        values: One per place on the x axis; the line passes over None.
        color: Of the line and of its label.
        width: How thick it is drawn.
    """

    label: str
    values: Sequence[float | None]
    color: str
    width: float = 2.0


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart.

    Attributes:
        label: Written beside it.
        x: Where it stands.
        y: How high.
        color: Of the dot and its label.
        joined: Whether the line through the best points goes through it.
    """

    label: str
    x: float
    y: float
    color: str
    joined: bool = False


def line_chart(lines: Sequence[Line], x: Sequence[int], *, x_name: str, y_name: str, log: bool = False) -> str:
    """Lines over whole numbers such as steps or epochs.

    Args:
        lines: Drawn in order, the last on top.
        x: Where the values stand, ascending.
        x_name: Written below the x axis.
        y_name: Written above the y axis.
        log: Equal distances for equal ratios; all values must then be above 0. Otherwise the axis holds 0.

    Returns:
        The chart, or an empty string if there is no value at all.
    """
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return ""
    low, high = _limits(values, log=log)
    span = math.log(high / low) if log else high - low

    def at_x(value: float) -> float:
        return _LEFT + (value - x[0]) / max(1, x[-1] - x[0]) * (WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        share = math.log(value / low) / span if log else (value - low) / span
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = [_y_axis(log_ticks(low, high) if log else ticks(low, high), at_y, y_name, WIDTH - _RIGHT)]
    marks = (
        list(x)
        if len(x) <= _MOST_MARKED
        else [mark for mark in ticks(x[0], x[-1]) if mark >= x[0] and mark == int(mark)]
    )
    parts += [_text(at_x(mark), HEIGHT - _BOTTOM + 16, f"{mark:g}", anchor="middle") for mark in marks]
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, x_name, anchor="middle"))
    ends: list[tuple[float, float, Line]] = []
    for line in lines:
        points = [(at_x(at), at_y(value)) for at, value in zip(x, line.values, strict=True) if value is not None]
        if points:
            parts.append(_path(points, line))
            ends.append((*points[-1], line))
    for y, (_, _, line) in zip(spread([end[1] for end in ends]), ends, strict=True):
        parts.append(_text(WIDTH - _RIGHT + 7, y + 4, line.label, color=line.color))
    return _svg(parts, f"{y_name} by {x_name}")


def bar_chart(counts: Sequence[int], marks: Sequence[int], *, x_name: str, y_name: str) -> str:
    """A histogram over an axis of equal bins.

    Args:
        counts: One per bin.
        marks: Numbers written below the axis, at equal distances from its beginning to its end.
        x_name: Written below the x axis.
        y_name: Written above the y axis.
    """
    right = WIDTH - 16
    high = max([*counts, 1])
    width = (right - _LEFT) / len(counts)

    def at_y(value: float) -> float:
        return HEIGHT - _BOTTOM - value / high * (HEIGHT - _TOP - _BOTTOM)

    parts = [_y_axis([tick for tick in ticks(0, high) if tick == int(tick)], at_y, y_name, right)]
    for index, count in enumerate(counts):
        x, y = _LEFT + index * width, at_y(count)
        parts.append(
            f"<rect x='{x + 0.75:.1f}' y='{y:.1f}' width='{width - 1.5:.1f}' height='{HEIGHT - _BOTTOM - y:.1f}' "
            f"fill='{COLORS[3]}'><title>{count}</title></rect>"
        )
    for index, mark in enumerate(marks):
        x = _LEFT + index / (len(marks) - 1) * (right - _LEFT)
        parts.append(_text(x, HEIGHT - _BOTTOM + 16, str(mark), anchor="middle"))
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 5, x_name, anchor="middle"))
    return _svg(parts, f"{y_name} by {x_name}")


def scatter_chart(points: Sequence[Point], *, x_name: str, y_name: str) -> str:
    """Points with their labels, and a line through those that are joined, from left to right.

    Args:
        points: At least one.
        x_name: Written below the x axis.
        y_name: Written above the y axis.
    """
    left, right = _around([point.x for point in points])
    low, high = _around([point.y for point in points])

    def at_x(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (WIDTH - _LEFT - 24)

    def at_y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_y_axis(ticks(low, high), at_y, y_name, WIDTH - 24)]
    marks = ticks(left, right)
    parts += [_text(at_x(m), HEIGHT - _BOTTOM + 16, f"{m:g}", anchor="middle") for m in marks[:: 1 + len(marks) // 6]]
    parts.append(_text((_LEFT + WIDTH - 24) / 2, HEIGHT - 5, x_name, anchor="middle"))
    line = [(at_x(p.x), at_y(p.y)) for p in sorted(points, key=lambda p: (p.x, -p.y)) if p.joined]
    if len(line) > 1:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f"<polyline points='{joined}' fill='none' stroke='#767676' stroke-dasharray='4 3'/>")
    for point in points:
        x, y = at_x(point.x), at_y(point.y)
        fill = point.color if point.joined else "#fff"
        parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{fill}' stroke='{point.color}' stroke-width='2'/>"
        )
    places = _beside([(at_x(point.x), at_y(point.y)) for point in points])
    for point, (x, y) in zip(points, places, strict=True):
        parts.append(_text(x, y, point.label, anchor="middle", color=point.color))
    return _svg(parts, f"{y_name} by {x_name}")


def _beside(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where labels stand: at the first corner of their point that no label has taken."""
    taken: list[tuple[float, float]] = []
    for x, y in points:
        corners = [(x + 11, y - 6), (x - 11, y - 6), (x + 11, y + 14), (x - 11, y + 14)]
        free = [c for c in corners if all(abs(c[0] - t[0]) > 14 or abs(c[1] - t[1]) > _LABEL_GAP for t in taken)]
        taken.append((free or corners)[0])
    return taken


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits with some room beyond the lowest and the highest value."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], 3 to 7 of them, a step of 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5 or 1.0
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for an axis of ratios; at most 7, and evenly spaced ones if the axis is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [float(f"{f * 10.0**p:.10g}") for p in powers for f in factors if low <= f * 10.0**p <= high]
        if 3 <= len(found) <= 7:
            return found
    return ticks(low, high)


def spread(wanted: Sequence[float]) -> list[float]:
    """Heights of labels near those wanted, at least a line of text apart and inside the chart."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = -math.inf
    for index in order:
        placed[index] = floor = max(wanted[index], floor + _LABEL_GAP)
    ceiling = float(HEIGHT - _BOTTOM)
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LABEL_GAP
    return placed


def _limits(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (0.0, 1.0)


def _y_axis(marks: Sequence[float], at_y: Callable[[float], float], name: str, right: float) -> str:
    parts = [_text(4, 12, name)]
    for mark in marks:
        y = at_y(mark)
        color = "#999" if mark == 0 else _GRID
        parts.append(f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='{color}'/>")
        parts.append(_text(_LEFT - 6, y + 4, f"{mark:g}", anchor="end"))
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], line: Line) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = f"<polyline points='{joined}' fill='none' stroke='{line.color}' stroke-width='{line.width}'/>"
    if len(points) > _MOST_MARKED:
        return drawn
    return drawn + "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{line.color}'/>" for x, y in points)


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = _INK) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{color}'>{html.escape(text)}</text>"


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(label, quote=True)}' "
        f"font-family='system-ui, sans-serif' font-size='12'>{''.join(parts)}</svg>"
    )
