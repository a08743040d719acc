"""A pen that draws sprites: shapes in a subject's own coordinates, on a canvas that is later made smaller.

Used by `world` and `sets`. Local coordinates run from -1 to 1 with y downward; the pen turns, scales,
mirrors and places them, so that a subject is written once and appears in any pose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Paint = Color | float | None
"""A colour; a shade of the subject's colour, from -1 (black) to 1 (white); or None for that colour itself."""
Point = tuple[float, float]

SIZE_PX = 64
OVERSAMPLING = 4
CANVAS_PX = SIZE_PX * OVERSAMPLING
INK: Color = (38, 32, 48)


def shade(color: Color, amount: float) -> Color:
    """Mix a colour with black (amount < 0) or white (amount > 0); amount is in [-1, 1]."""
    target = 255 if amount > 0 else 0
    red, green, blue = (round(c + (target - c) * abs(amount)) for c in color)
    return red, green, blue


def new_canvas(color: Color) -> Image.Image:
    """An empty oversampled canvas in one colour."""
    return Image.new("RGB", (CANVAS_PX, CANVAS_PX), color)


def shrink(canvas: Image.Image, size_px: int = SIZE_PX) -> Image.Image:
    """The finished square image of 64 or 128 pixels: the canvas averaged down, which smooths the edges."""
    return canvas.reduce(CANVAS_PX // size_px)


@dataclass
class Pen:
    """Draws in local coordinates and remembers where the patterned colour went."""

    canvas: Image.Image  # the oversampled image, drawn on in place
    center: Point  # where the local origin lies, in pixels of the finished image
    radius_px: float  # how long one local unit is, in pixels of the finished image
    color: Color  # the subject's colour
    angle: float = 0.0  # turn, in radians, clockwise
    mirrored: bool = False  # whether left and right are exchanged
    outline: Color | None = INK  # colour of all outlines; None draws none
    _mask: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        self._mask = Image.new("L", self.canvas.size, 0)

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Local points to canvas points."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        flip = -1.0 if self.mirrored else 1.0
        unit = self.radius_px * OVERSAMPLING
        return [
            (
                self.center[0] * OVERSAMPLING + flip * unit * (x * cos - y * sin),
                self.center[1] * OVERSAMPLING + unit * (x * sin + y * cos),
            )
            for x, y in points
        ]

    def _fill(self, placed: Sequence[Point], fill: Paint) -> None:
        ImageDraw.Draw(self.canvas).polygon(placed, fill=self._color(fill))
        ImageDraw.Draw(self._mask).polygon(placed, fill=255 if fill is None else 0)

    def _color(self, paint: Paint) -> Color:
        if paint is None:
            return self.color
        return shade(self.color, paint) if isinstance(paint, float) else paint

    def polygon(self, points: Sequence[Point], fill: Paint = None) -> None:
        """A closed shape; without a fill it takes the subject's pattern as well as its colour."""
        placed = self.place(points)
        self._fill(placed, fill)
        if self.outline is not None:
            self._stroke([*placed, placed[0], placed[1]], self.outline, 1.0)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Paint = None) -> None:
        """An ellipse with half-axes rx and ry around (x, y)."""
        self.polygon(arc(x, y, rx, ry, 0, 360)[:-1], fill)

    def dot(self, x: float, y: float, radius: float, fill: Paint) -> None:
        """A small disc without an outline, such as an eye."""
        self._fill(self.place(arc(x, y, radius, radius, 0, 360, steps=16)[:-1]), fill)

    def line(self, points: Sequence[Point], color: Paint, width_px: float = 1.0) -> None:
        """An open stroke, its width in pixels of the finished image."""
        self._stroke(self.place(points), self._color(color), width_px)

    def _stroke(self, placed: Sequence[Point], color: Color, width_px: float) -> None:
        width = max(1, round(width_px * OVERSAMPLING))
        ImageDraw.Draw(self.canvas).line(list(placed), fill=color, width=width, joint="curve")

    def paint_pattern(self, pattern: str) -> None:
        """Lay stripes or spots in a darker shade over what was drawn in the subject's colour."""
        if pattern == "plain":
            return
        layer = Image.new("L", self.canvas.size, 0)
        draw = ImageDraw.Draw(layer)
        if pattern == "striped":
            for index in range(-6, 7):
                x = index * 0.36
                draw.polygon(self.place([(x, -1.5), (x + 0.17, -1.5), (x + 0.17, 1.5), (x, 1.5)]), fill=255)
        else:
            for row in range(-3, 4):
                for column in range(-3, 4):
                    x, y = column * 0.46 + (row % 2) * 0.23, row * 0.4
                    draw.polygon(self.place(arc(x, y, 0.13, 0.13, 0, 360, steps=12)[:-1]), fill=255)
        darker = Image.new("RGB", self.canvas.size, shade(self.color, -0.45))
        both = Image.composite(layer, Image.new("L", self.canvas.size, 0), self._mask)
        self.canvas.paste(darker, (0, 0), both)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 32) -> list[Point]:
    """Points along an ellipse from one angle to another, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]
