"""The world that pocket knows: sprites of sixteen kinds in eight colours and eight places, with captions.

Read by `pretrain` (what the base learns) and by the benchmarks (what it is asked for). Everything is
drawn by code; a scene and its image are functions of a number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageDraw

from sdlora.common.seeds import derive
from sdlora.pocket.pen import INK, OVERSAMPLING, SIZE_PX, Color, Pen, arc, new_canvas, shrink

WHITE: Color = (246, 246, 244)

COLORS: dict[str, Color] = {
    "red": (214, 48, 49),
    "orange": (240, 136, 30),
    "yellow": (250, 214, 60),
    "green": (52, 172, 72),
    "blue": (52, 108, 222),
    "purple": (138, 66, 190),
    "pink": (246, 132, 178),
    "white": WHITE,
}
SIZES: dict[str, float] = {"small": 12.0, "": 15.0, "big": 20.5}
POSITIONS: dict[str, float] = {"on the left": -11.0, "": 0.0, "on the right": 11.0}
PATTERNS = ("plain", "striped", "spotted")


@dataclass(frozen=True)
class Scene:
    """One image of the world: what is in it, and the number its details are drawn from."""

    kind: str
    color: str
    pattern: str
    size: str
    position: str
    place: str
    seed: int


# The kinds: shapes in local coordinates, within -1 .. 1, as methods of a pen with their arguments.
Shape = tuple[Any, ...]
_GLASS: Color = (176, 222, 244)
_TAIL = [(-0.6, 0.6), (-0.95, 0.35), (-0.85, -0.1)]
_STAR = zip(arc(0, 0.05, 1.0, 1.0, -90, 270, steps=5)[:5], arc(0, 0.05, 0.42, 0.42, -54, 306, steps=5)[:5], strict=True)
_TURTLE_SKIN, _SNAIL_SKIN = (150, 190, 100), (226, 198, 160)
KINDS: dict[str, list[Shape]] = {
    "ball": [("oval", 0, 0, 0.9, 0.9), ("dot", -0.35, -0.4, 0.18, 0.6)],
    "star": [("polygon", [point for pair in _STAR for point in pair])],
    "heart": [
        ("polygon", [
            *arc(-0.45, -0.3, 0.48, 0.5, 160, 340, steps=16),
            *arc(0.45, -0.3, 0.48, 0.5, 200, 380, steps=16),
            (0, 0.95),
        ]),
    ],
    "moon": [("polygon", [*arc(0, 0, 0.95, 0.95, 50, 310), *arc(0.42, 0, 0.72, 0.74, 285, 75)])],
    "cat": [
        ("line", _TAIL, INK, 2.6),
        ("line", _TAIL, None, 1.4),
        ("oval", -0.15, 0.5, 0.55, 0.42),
        ("polygon", [(-0.2, -0.4), (-0.15, -1.0), (0.2, -0.68)]),
        ("polygon", [(0.75, -0.4), (0.75, -1.0), (0.4, -0.68)]),
        ("oval", 0.28, -0.2, 0.55, 0.5),
        ("dot", 0.1, -0.25, 0.1, INK),
        ("dot", 0.5, -0.25, 0.1, INK),
        ("dot", 0.3, 0.0, 0.07, (240, 150, 160)),
    ],
    "bird": [
        ("polygon", [(-0.5, 0.1), (-1.0, -0.15), (-0.95, 0.35)]),
        ("oval", -0.1, 0.15, 0.62, 0.45),
        ("oval", 0.42, -0.35, 0.36, 0.34),
        ("polygon", [(0.74, -0.42), (1.0, -0.28), (0.72, -0.18)], (250, 170, 40)),
        ("polygon", [(-0.45, 0.0), (0.2, 0.0), (-0.2, 0.42)], -0.3),
        ("dot", 0.5, -0.42, 0.08, INK),
        ("line", [(-0.15, 0.6), (-0.15, 0.92)], INK, 1.0),
        ("line", [(0.1, 0.6), (0.1, 0.92)], INK, 1.0),
    ],
    "fish": [
        ("polygon", [(-0.45, 0), (-1.0, -0.5), (-0.85, 0), (-1.0, 0.5)], -0.25),
        ("polygon", [(-0.1, -0.4), (0.2, -0.8), (0.4, -0.35)], -0.25),
        ("oval", 0.15, 0, 0.75, 0.5),
        ("dot", 0.58, -0.12, 0.13, WHITE),
        ("dot", 0.61, -0.12, 0.07, INK),
    ],
    "turtle": [
        ("oval", 0.78, 0.05, 0.24, 0.22, _TURTLE_SKIN),
        ("oval", -0.45, 0.55, 0.2, 0.26, _TURTLE_SKIN),
        ("oval", 0.4, 0.55, 0.2, 0.26, _TURTLE_SKIN),
        ("polygon", [*arc(0, 0.45, 0.8, 0.95, 180, 360), (0.8, 0.45), (-0.8, 0.45)]),
        ("dot", 0.84, 0.0, 0.07, INK),
    ],
    "snail": [
        ("polygon", [(-0.95, 0.8), (-0.5, 0.55), (0.5, 0.55), (0.62, 0.0), (0.9, 0.0), (0.92, 0.8)], _SNAIL_SKIN),
        ("line", [(0.68, 0.0), (0.6, -0.4)], INK, 1.0),
        ("line", [(0.84, 0.0), (0.92, -0.4)], INK, 1.0),
        ("oval", -0.15, 0.05, 0.66, 0.64),
        ("line", [*arc(-0.15, 0.05, 0.36, 0.34, 0, 300), *arc(-0.15, 0.05, 0.16, 0.15, 300, 560, steps=12)], -0.5, 1.0),
    ],
    "house": [
        ("polygon", [(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)]),
        ("polygon", [(-0.98, -0.1), (0, -0.95), (0.98, -0.1)], (120, 78, 60)),
        ("polygon", [(-0.2, 0.9), (-0.2, 0.3), (0.15, 0.3), (0.15, 0.9)], (86, 54, 44)),
        ("polygon", [(0.32, 0.15), (0.6, 0.15), (0.6, 0.45), (0.32, 0.45)], _GLASS),
    ],
    "car": [
        ("polygon", [(-0.5, 0.05), (-0.3, -0.45), (0.3, -0.45), (0.55, 0.05)], _GLASS),
        ("polygon", [(-0.98, 0.05), (0.85, 0.05), (0.98, 0.25), (0.98, 0.5), (-0.98, 0.5)]),
        ("oval", -0.52, 0.55, 0.25, 0.25, INK),
        ("dot", -0.52, 0.55, 0.1, (190, 190, 196)),
        ("oval", 0.52, 0.55, 0.25, 0.25, INK),
        ("dot", 0.52, 0.55, 0.1, (190, 190, 196)),
    ],
    "boat": [
        ("line", [(0, 0.4), (0, -0.98)], (110, 74, 50), 1.6),
        ("polygon", [(0.1, -0.9), (0.1, 0.2), (0.85, 0.2)]),
        ("polygon", [(-0.1, -0.6), (-0.1, 0.2), (-0.6, 0.2)]),
        ("polygon", [(-0.98, 0.35), (0.98, 0.35), (0.6, 0.85), (-0.65, 0.85)], (128, 84, 56)),
    ],
    "tree": [
        ("polygon", [(-0.16, 0.95), (-0.16, 0.2), (0.16, 0.2), (0.16, 0.95)], (120, 80, 50)),
        ("polygon", [(-0.85, 0.5), (0, -0.35), (0.85, 0.5)]),
        ("polygon", [(-0.65, -0.1), (0, -0.98), (0.65, -0.1)]),
    ],
    "mushroom": [
        ("polygon", [(-0.28, 0.0), (0.28, 0.0), (0.38, 0.9), (-0.38, 0.9)], (240, 228, 206)),
        ("polygon", [*arc(0, 0.1, 0.95, 0.95, 180, 360), (0.95, 0.1), (-0.95, 0.1)]),
    ],
    "cup": [
        ("line", arc(0.55, 0.05, 0.38, 0.34, -90, 90), INK, 3.2),
        ("line", arc(0.55, 0.05, 0.38, 0.34, -90, 90), None, 1.8),
        ("polygon", [(-0.75, -0.55), (0.6, -0.55), (0.45, 0.8), (-0.6, 0.8)]),
        ("oval", -0.08, -0.55, 0.67, 0.16, (92, 58, 42)),
    ],
    "key": [
        ("polygon", [
            (-0.1, -0.13), (0.98, -0.13), (0.98, 0.45), (0.74, 0.45), (0.74, 0.13),
            (0.56, 0.13), (0.56, 0.38), (0.34, 0.38), (0.34, 0.13), (-0.1, 0.13),
        ]),
        ("oval", -0.5, 0, 0.48, 0.48),
        ("oval", -0.5, 0, 0.17, 0.17, -0.75),
    ],
}  # fmt: skip


def draw_kind(pen: Pen, kind: str) -> None:
    """Draw a subject of the world."""
    for method, *arguments in KINDS[kind]:
        getattr(pen, method)(*arguments)


# --- Places: each paints the whole canvas, its details from a random number generator ------------------------------


def _rectangle(canvas: Image.Image, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
    box = [x0 * OVERSAMPLING, y0 * OVERSAMPLING, x1 * OVERSAMPLING - 1, y1 * OVERSAMPLING - 1]
    ImageDraw.Draw(canvas).rectangle(box, fill=fill)


def _ellipse(canvas: Image.Image, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
    box = [(x - rx) * OVERSAMPLING, (y - ry) * OVERSAMPLING, (x + rx) * OVERSAMPLING, (y + ry) * OVERSAMPLING]
    ImageDraw.Draw(canvas).ellipse(box, fill=fill)


def _triangle(canvas: Image.Image, points: list[tuple[float, float]], fill: Color) -> None:
    ImageDraw.Draw(canvas).polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill=fill)


def _meadow(canvas: Image.Image, rng: random.Random) -> None:
    _ellipse(canvas, rng.uniform(8, 56), rng.uniform(6, 13), 9, 3.5, (238, 248, 252))
    horizon = rng.uniform(34, 42)
    _rectangle(canvas, 0, horizon, 64, 64, (124, 198, 92))
    for _ in range(9):
        x, y = rng.uniform(2, 62), rng.uniform(horizon + 4, 62)
        _triangle(canvas, [(x - 1.5, y), (x, y - 4), (x + 1.5, y)], (84, 158, 66))


def _desert(canvas: Image.Image, rng: random.Random) -> None:
    _ellipse(canvas, rng.uniform(8, 56), rng.uniform(7, 13), 5, 5, (252, 246, 214))
    horizon = rng.uniform(34, 42)
    _rectangle(canvas, 0, horizon, 64, 64, (222, 172, 98))
    for _ in range(3):
        _ellipse(canvas, rng.uniform(0, 64), horizon + rng.uniform(2, 16), rng.uniform(12, 24), 3.5, (204, 150, 80))


def _night(canvas: Image.Image, rng: random.Random) -> None:
    for _ in range(14):
        radius = rng.uniform(0.5, 1.1)
        _ellipse(canvas, rng.uniform(1, 63), rng.uniform(1, 48), radius, radius, (250, 244, 196))
    _rectangle(canvas, 0, rng.uniform(50, 55), 64, 64, (40, 44, 60))


def _sea(canvas: Image.Image, rng: random.Random) -> None:
    horizon = rng.uniform(26, 34)
    _rectangle(canvas, 0, horizon, 64, 64, (40, 128, 180))
    for row in range(4):
        y, offset = horizon + 6 + row * 8, rng.uniform(0, 14)
        for index in range(6):
            x = offset + index * 14 - 14
            _ellipse(canvas, x, y, 4.5, 1.3, (132, 200, 226))


def _snow(canvas: Image.Image, rng: random.Random) -> None:
    _ellipse(canvas, rng.uniform(10, 54), rng.uniform(62, 70), 60, 26, (236, 242, 248))
    for _ in range(16):
        radius = rng.uniform(0.8, 1.4)
        _ellipse(canvas, rng.uniform(1, 63), rng.uniform(1, 40), radius, radius, (250, 252, 254))


def _forest(canvas: Image.Image, rng: random.Random) -> None:
    x = rng.uniform(0, 6)
    while x < 64:
        width = rng.uniform(3, 6)
        _rectangle(canvas, x, 0, x + width, 52, (74, 52, 38))
        x += width + rng.uniform(5, 11)
    _rectangle(canvas, 0, 50, 64, 64, (58, 104, 48))


def _city(canvas: Image.Image, rng: random.Random) -> None:
    x = rng.uniform(-6, 0)
    while x < 64:
        width, top = rng.uniform(11, 16), rng.uniform(6, 26)
        _rectangle(canvas, x, top, x + width, 54, rng.choice([(122, 122, 136), (100, 104, 122), (142, 134, 144)]))
        for wy in range(int(top) + 3, 48, 7):
            for wx in (x + 2.5, x + width - 5.5):
                _rectangle(canvas, wx, wy, wx + 3, wy + 3, (240, 222, 140))
        x += width + 1
    _rectangle(canvas, 0, 53, 64, 64, (74, 74, 82))


def _room(canvas: Image.Image, rng: random.Random) -> None:
    for x in range(int(rng.uniform(0, 8)), 64, 8):
        _rectangle(canvas, x, 0, x + 2, 46, (222, 184, 170))
    _rectangle(canvas, 0, 44, 64, 64, (150, 98, 62))
    for y in (50, 57):
        _rectangle(canvas, 0, y, 64, y + 0.8, (112, 70, 44))
    left = rng.choice([rng.uniform(3, 12), rng.uniform(42, 50)])
    _rectangle(canvas, left, 5, left + 12, 18, (250, 246, 232))
    _rectangle(canvas, left + 1.5, 6.5, left + 10.5, 16.5, (168, 214, 238))


def _painted(color: Color, details: Callable[[Image.Image, random.Random], None], rng: random.Random) -> Image.Image:
    canvas = new_canvas(color)
    details(canvas, rng)
    return canvas


PLACES: dict[str, tuple[str, Callable[[random.Random], Image.Image]]] = {
    "meadow": ("in a meadow", partial(_painted, (160, 216, 246), _meadow)),
    "desert": ("in the desert", partial(_painted, (250, 222, 170), _desert)),
    "night": ("at night", partial(_painted, (24, 28, 66), _night)),
    "sea": ("by the sea", partial(_painted, (196, 232, 244), _sea)),
    "snow": ("in the snow", partial(_painted, (170, 186, 206), _snow)),
    "forest": ("in the forest", partial(_painted, (28, 74, 50), _forest)),
    "city": ("in the city", partial(_painted, (214, 206, 216), _city)),
    "room": ("in a room", partial(_painted, (232, 200, 186), _room)),
}


def is_unseen(kind: str, color: str, place: str) -> bool:
    """Whether this combination is kept from the base's training, to test that it composes (one in eight)."""
    return derive(0, "unseen combination", kind, color, place) % 8 == 0


def random_scene(seed: int, *, unseen: bool | None = None) -> Scene:
    """A scene as a function of a number.

    Args:
        seed: Any integer.
        unseen: True or False keeps only combinations outside or inside the base's training; None keeps all.
    """
    rng = random.Random(derive(0, "scene", seed))
    while True:
        kind, color, place = rng.choice(list(KINDS)), rng.choice(list(COLORS)), rng.choice(list(PLACES))
        if unseen is None or is_unseen(kind, color, place) == unseen:
            break
    pattern = rng.choice(["plain", "plain", "striped", "spotted"])
    size, position = rng.choice(list(SIZES)), rng.choice(list(POSITIONS))
    return Scene(kind, color, pattern, size, position, place, seed)


def subject_pen(canvas: Image.Image, scene: Scene, rng: random.Random) -> Pen:
    """The pen that a scene's subject is drawn with: placed, slightly turned, facing either way."""
    radius = SIZES[scene.size] * rng.uniform(0.94, 1.06)
    reach = SIZE_PX / 2 - radius - 1
    x = 32 + max(-reach, min(reach, POSITIONS[scene.position] + rng.uniform(-2, 2)))
    y = min(62 - radius, 38 + rng.uniform(-3, 3))
    return Pen(canvas, (x, y), radius, COLORS[scene.color], rng.uniform(-0.1, 0.1), rng.random() < 0.5)


def render_canvas(scene: Scene) -> Image.Image:
    """A scene at the oversampled size."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = PLACES[scene.place][1](rng)
    pen = subject_pen(canvas, scene, rng)
    draw_kind(pen, scene.kind)
    pen.paint_pattern(scene.pattern)
    return canvas


def render(scene: Scene, size_px: int = SIZE_PX) -> Image.Image:
    """The square RGB image of a scene, of 64 or 128 pixels."""
    return shrink(render_canvas(scene), size_px)


def caption(scene: Scene) -> str:
    """Everything a scene shows, in words."""
    pattern = "" if scene.pattern == "plain" else scene.pattern
    words = ["a", scene.size, scene.color, pattern, scene.kind, scene.position, PLACES[scene.place][0]]
    return " ".join(word for word in words if word)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as people write them: words are left out now and then, and the order of the parts varies.

    One in ten carries an invented name, so that letters and unknown words are no surprise to the text encoder.
    """
    size = scene.size if rng.random() < 0.9 else ""
    color = scene.color if rng.random() < 0.93 else ""
    pattern = scene.pattern if scene.pattern != "plain" and rng.random() < 0.9 else ""
    position = scene.position if rng.random() < 0.9 else ""
    place = PLACES[scene.place][0] if rng.random() < 0.93 else ""
    subject = " ".join(word for word in ("a", size, color, pattern, scene.kind) if word)
    if rng.random() < 0.1:
        subject += " named " + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))
    parts = [part for part in (subject, position, place) if part]
    style = rng.random()
    if style >= 0.85:
        rng.shuffle(parts)
    return (" " if style < 0.6 else ", ").join(parts)
