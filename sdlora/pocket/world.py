"""The world that pocket knows: sprites of sixteen kinds in eight colours and eight places, with captions.

Read by `pretrain` (what the base learns) and by the benchmarks (what it is asked for). Everything is
drawn by code; a scene and its image are functions of a number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from sdlora.common.seeds import derive
from sdlora.pocket.pen import CANVAS_PX, INK, OVERSAMPLING, SIZE_PX, Color, Pen, arc, new_canvas, shade, shrink

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


# --- Kinds: each draws itself in local coordinates, within -1 .. 1 -------------------------------------------------


def _ball(pen: Pen) -> None:
    pen.oval(0, 0, 0.9, 0.9)
    pen.dot(-0.35, -0.4, 0.18, shade(pen.color, 0.6))


def _star(pen: Pen) -> None:
    outer, inner = arc(0, 0.05, 1.0, 1.0, -90, 270, steps=5), arc(0, 0.05, 0.42, 0.42, -54, 306, steps=5)
    pen.polygon([point for pair in zip(outer[:5], inner[:5], strict=True) for point in pair])


def _heart(pen: Pen) -> None:
    left, right = arc(-0.45, -0.3, 0.48, 0.5, 160, 340, steps=16), arc(0.45, -0.3, 0.48, 0.5, 200, 380, steps=16)
    pen.polygon([*left, *right, (0, 0.95)])


def _moon(pen: Pen) -> None:
    pen.polygon([*arc(0, 0, 0.95, 0.95, 50, 310), *arc(0.42, 0, 0.72, 0.74, 285, 75)])


def _cat(pen: Pen) -> None:
    pen.line([(-0.6, 0.6), (-0.95, 0.35), (-0.85, -0.1)], INK, 2.6)
    pen.line([(-0.6, 0.6), (-0.95, 0.35), (-0.85, -0.1)], pen.color, 1.4)
    pen.oval(-0.15, 0.5, 0.55, 0.42)
    pen.polygon([(-0.2, -0.4), (-0.15, -1.0), (0.2, -0.68)])
    pen.polygon([(0.75, -0.4), (0.75, -1.0), (0.4, -0.68)])
    pen.oval(0.28, -0.2, 0.55, 0.5)
    pen.dot(0.1, -0.25, 0.1, INK)
    pen.dot(0.5, -0.25, 0.1, INK)
    pen.dot(0.3, 0.0, 0.07, (240, 150, 160))


def _bird(pen: Pen) -> None:
    pen.polygon([(-0.5, 0.1), (-1.0, -0.15), (-0.95, 0.35)])
    pen.oval(-0.1, 0.15, 0.62, 0.45)
    pen.oval(0.42, -0.35, 0.36, 0.34)
    pen.polygon([(0.74, -0.42), (1.0, -0.28), (0.72, -0.18)], (250, 170, 40))
    pen.polygon([(-0.45, 0.0), (0.2, 0.0), (-0.2, 0.42)], shade(pen.color, -0.3))
    pen.dot(0.5, -0.42, 0.08, INK)
    pen.line([(-0.15, 0.6), (-0.15, 0.92)], INK, 1.0)
    pen.line([(0.1, 0.6), (0.1, 0.92)], INK, 1.0)


def _fish(pen: Pen) -> None:
    pen.polygon([(-0.45, 0), (-1.0, -0.5), (-0.85, 0), (-1.0, 0.5)], shade(pen.color, -0.25))
    pen.polygon([(-0.1, -0.4), (0.2, -0.8), (0.4, -0.35)], shade(pen.color, -0.25))
    pen.oval(0.15, 0, 0.75, 0.5)
    pen.dot(0.58, -0.12, 0.13, WHITE)
    pen.dot(0.61, -0.12, 0.07, INK)


def _turtle(pen: Pen) -> None:
    skin = (150, 190, 100)
    pen.oval(0.78, 0.05, 0.24, 0.22, skin)
    pen.oval(-0.45, 0.55, 0.2, 0.26, skin)
    pen.oval(0.4, 0.55, 0.2, 0.26, skin)
    pen.polygon([*arc(0, 0.45, 0.8, 0.95, 180, 360), (0.8, 0.45), (-0.8, 0.45)])
    pen.dot(0.84, 0.0, 0.07, INK)


def _snail(pen: Pen) -> None:
    body = (226, 198, 160)
    pen.polygon([(-0.95, 0.8), (-0.5, 0.55), (0.5, 0.55), (0.62, 0.0), (0.9, 0.0), (0.92, 0.8)], body)
    pen.line([(0.68, 0.0), (0.6, -0.4)], INK, 1.0)
    pen.line([(0.84, 0.0), (0.92, -0.4)], INK, 1.0)
    pen.oval(-0.15, 0.05, 0.66, 0.64)
    spiral = [*arc(-0.15, 0.05, 0.36, 0.34, 0, 300), *arc(-0.15, 0.05, 0.16, 0.15, 300, 560, steps=12)]
    pen.line(spiral, shade(pen.color, -0.5), 1.0)


def _house(pen: Pen) -> None:
    pen.polygon([(-0.75, -0.1), (0.75, -0.1), (0.75, 0.9), (-0.75, 0.9)])
    pen.polygon([(-0.98, -0.1), (0, -0.95), (0.98, -0.1)], (120, 78, 60))
    pen.polygon([(-0.2, 0.9), (-0.2, 0.3), (0.15, 0.3), (0.15, 0.9)], (86, 54, 44))
    pen.polygon([(0.32, 0.15), (0.6, 0.15), (0.6, 0.45), (0.32, 0.45)], (176, 222, 244))


def _car(pen: Pen) -> None:
    pen.polygon([(-0.5, 0.05), (-0.3, -0.45), (0.3, -0.45), (0.55, 0.05)], (176, 222, 244))
    pen.polygon([(-0.98, 0.05), (0.85, 0.05), (0.98, 0.25), (0.98, 0.5), (-0.98, 0.5)])
    for x in (-0.52, 0.52):
        pen.oval(x, 0.55, 0.25, 0.25, INK)
        pen.dot(x, 0.55, 0.1, (190, 190, 196))


def _boat(pen: Pen) -> None:
    pen.line([(0, 0.4), (0, -0.98)], (110, 74, 50), 1.6)
    pen.polygon([(0.1, -0.9), (0.1, 0.2), (0.85, 0.2)])
    pen.polygon([(-0.1, -0.6), (-0.1, 0.2), (-0.6, 0.2)])
    pen.polygon([(-0.98, 0.35), (0.98, 0.35), (0.6, 0.85), (-0.65, 0.85)], (128, 84, 56))


def _tree(pen: Pen) -> None:
    pen.polygon([(-0.16, 0.95), (-0.16, 0.2), (0.16, 0.2), (0.16, 0.95)], (120, 80, 50))
    pen.polygon([(-0.85, 0.5), (0, -0.35), (0.85, 0.5)])
    pen.polygon([(-0.65, -0.1), (0, -0.98), (0.65, -0.1)])


def _mushroom(pen: Pen) -> None:
    pen.polygon([(-0.28, 0.0), (0.28, 0.0), (0.38, 0.9), (-0.38, 0.9)], (240, 228, 206))
    pen.polygon([*arc(0, 0.1, 0.95, 0.95, 180, 360), (0.95, 0.1), (-0.95, 0.1)])


def _cup(pen: Pen) -> None:
    pen.line(arc(0.55, 0.05, 0.38, 0.34, -90, 90), INK, 3.2)
    pen.line(arc(0.55, 0.05, 0.38, 0.34, -90, 90), pen.color, 1.8)
    pen.polygon([(-0.75, -0.55), (0.6, -0.55), (0.45, 0.8), (-0.6, 0.8)])
    pen.oval(-0.08, -0.55, 0.67, 0.16, (92, 58, 42))


def _key(pen: Pen) -> None:
    pen.polygon([(-0.1, -0.13), (0.98, -0.13), (0.98, 0.45), (0.74, 0.45), (0.74, 0.13),
                 (0.56, 0.13), (0.56, 0.38), (0.34, 0.38), (0.34, 0.13), (-0.1, 0.13)])  # fmt: skip
    pen.oval(-0.5, 0, 0.48, 0.48)
    pen.oval(-0.5, 0, 0.17, 0.17, shade(pen.color, -0.75))


KINDS: dict[str, Callable[[Pen], None]] = {
    "ball": _ball, "star": _star, "heart": _heart, "moon": _moon,
    "cat": _cat, "bird": _bird, "fish": _fish, "turtle": _turtle,
    "snail": _snail, "house": _house, "car": _car, "boat": _boat,
    "tree": _tree, "mushroom": _mushroom, "cup": _cup, "key": _key,
}  # fmt: skip


# --- Places: each paints the whole canvas, its details from a random number generator ------------------------------


def _rectangle(canvas: Image.Image, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
    box = [x0 * OVERSAMPLING, y0 * OVERSAMPLING, x1 * OVERSAMPLING - 1, y1 * OVERSAMPLING - 1]
    ImageDraw.Draw(canvas).rectangle(box, fill=fill)


def _ellipse(canvas: Image.Image, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
    box = [(x - rx) * OVERSAMPLING, (y - ry) * OVERSAMPLING, (x + rx) * OVERSAMPLING, (y + ry) * OVERSAMPLING]
    ImageDraw.Draw(canvas).ellipse(box, fill=fill)


def _triangle(canvas: Image.Image, points: list[tuple[float, float]], fill: Color) -> None:
    ImageDraw.Draw(canvas).polygon([(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points], fill=fill)


def _meadow(rng: random.Random) -> Image.Image:
    canvas = new_canvas((160, 216, 246))
    _ellipse(canvas, rng.uniform(8, 56), rng.uniform(6, 13), 9, 3.5, (238, 248, 252))
    horizon = rng.uniform(34, 42)
    _rectangle(canvas, 0, horizon, 64, 64, (124, 198, 92))
    for _ in range(9):
        x, y = rng.uniform(2, 62), rng.uniform(horizon + 4, 62)
        _triangle(canvas, [(x - 1.5, y), (x, y - 4), (x + 1.5, y)], (84, 158, 66))
    return canvas


def _desert(rng: random.Random) -> Image.Image:
    canvas = new_canvas((250, 222, 170))
    _ellipse(canvas, rng.uniform(8, 56), rng.uniform(7, 13), 5, 5, (252, 246, 214))
    horizon = rng.uniform(34, 42)
    _rectangle(canvas, 0, horizon, 64, 64, (222, 172, 98))
    for _ in range(3):
        _ellipse(canvas, rng.uniform(0, 64), horizon + rng.uniform(2, 16), rng.uniform(12, 24), 3.5, (204, 150, 80))
    return canvas


def _night(rng: random.Random) -> Image.Image:
    canvas = new_canvas((24, 28, 66))
    for _ in range(14):
        radius = rng.uniform(0.5, 1.1)
        _ellipse(canvas, rng.uniform(1, 63), rng.uniform(1, 48), radius, radius, (250, 244, 196))
    _rectangle(canvas, 0, rng.uniform(50, 55), 64, 64, (40, 44, 60))
    return canvas


def _sea(rng: random.Random) -> Image.Image:
    canvas = new_canvas((196, 232, 244))
    horizon = rng.uniform(26, 34)
    _rectangle(canvas, 0, horizon, 64, 64, (40, 128, 180))
    for row in range(4):
        y, offset = horizon + 6 + row * 8, rng.uniform(0, 14)
        for index in range(6):
            x = offset + index * 14 - 14
            _ellipse(canvas, x, y, 4.5, 1.3, (132, 200, 226))
    return canvas


def _snow(rng: random.Random) -> Image.Image:
    canvas = new_canvas((170, 186, 206))
    _ellipse(canvas, rng.uniform(10, 54), rng.uniform(62, 70), 60, 26, (236, 242, 248))
    for _ in range(16):
        radius = rng.uniform(0.8, 1.4)
        _ellipse(canvas, rng.uniform(1, 63), rng.uniform(1, 40), radius, radius, (250, 252, 254))
    return canvas


def _forest(rng: random.Random) -> Image.Image:
    canvas = new_canvas((28, 74, 50))
    x = rng.uniform(0, 6)
    while x < 64:
        width = rng.uniform(3, 6)
        _rectangle(canvas, x, 0, x + width, 52, (74, 52, 38))
        x += width + rng.uniform(5, 11)
    _rectangle(canvas, 0, 50, 64, 64, (58, 104, 48))
    return canvas


def _city(rng: random.Random) -> Image.Image:
    canvas = new_canvas((214, 206, 216))
    x = rng.uniform(-6, 0)
    while x < 64:
        width, top = rng.uniform(11, 16), rng.uniform(6, 26)
        _rectangle(canvas, x, top, x + width, 54, rng.choice([(122, 122, 136), (100, 104, 122), (142, 134, 144)]))
        for wy in range(int(top) + 3, 48, 7):
            for wx in (x + 2.5, x + width - 5.5):
                _rectangle(canvas, wx, wy, wx + 3, wy + 3, (240, 222, 140))
        x += width + 1
    _rectangle(canvas, 0, 53, 64, 64, (74, 74, 82))
    return canvas


def _room(rng: random.Random) -> Image.Image:
    canvas = new_canvas((232, 200, 186))
    for x in range(int(rng.uniform(0, 8)), 64, 8):
        _rectangle(canvas, x, 0, x + 2, 46, (222, 184, 170))
    _rectangle(canvas, 0, 44, 64, 64, (150, 98, 62))
    for y in (50, 57):
        _rectangle(canvas, 0, y, 64, y + 0.8, (112, 70, 44))
    left = rng.choice([rng.uniform(3, 12), rng.uniform(42, 50)])
    _rectangle(canvas, left, 5, left + 12, 18, (250, 246, 232))
    _rectangle(canvas, left + 1.5, 6.5, left + 10.5, 16.5, (168, 214, 238))
    return canvas


PLACES: dict[str, tuple[str, Callable[[random.Random], Image.Image]]] = {
    "meadow": ("in a meadow", _meadow),
    "desert": ("in the desert", _desert),
    "night": ("at night", _night),
    "sea": ("by the sea", _sea),
    "snow": ("in the snow", _snow),
    "forest": ("in the forest", _forest),
    "city": ("in the city", _city),
    "room": ("in a room", _room),
}

NUM_SCENES = len(KINDS) * len(COLORS) * len(PATTERNS) * len(SIZES) * len(POSITIONS) * len(PLACES)


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


def render_canvas(scene: Scene, draw: Callable[[Pen], None] | None = None) -> Image.Image:
    """A scene at the oversampled size; `draw` puts another subject in the place of the scene's own."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = PLACES[scene.place][1](rng)
    pen = subject_pen(canvas, scene, rng)
    (draw or KINDS[scene.kind])(pen)
    pen.paint_pattern(scene.pattern)
    assert canvas.size == (CANVAS_PX, CANVAS_PX)
    return canvas


def render(scene: Scene) -> Image.Image:
    """The 64x64 RGB image of a scene."""
    return shrink(render_canvas(scene))


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
    if style < 0.6:
        return " ".join(parts)
    if style < 0.85:
        return ", ".join(parts)
    rng.shuffle(parts)
    return ", ".join(parts)
