"""Draws the two sample sets: a character that the world does not contain, and a style it was never drawn in.

`python -m sdlora.pocket.sets --output datasets` writes the committed files, byte for byte.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw

from sdlora.common.files import atomic_path, write_text
from sdlora.common.seeds import derive
from sdlora.pocket.pen import CANVAS_PX, INK, OVERSAMPLING, Color, Paint, Pen, Point, new_canvas, shrink
from sdlora.pocket.world import KINDS, PLACES, POSITIONS, SIZES, WHITE, Scene, draw_kind, subject_pen

T = TypeVar("T")
NUM_TRAINING, NUM_VALIDATION = 24, 8

TEAL: Color = (30, 164, 160)
CREAM: Color = (244, 232, 200)
SUN: Color = (252, 206, 64)
SCARF: Color = (226, 74, 84)
PAPER: Color = (34, 74, 150)
GRID: Color = (52, 94, 170)

LICENSE_TEXT = """# {title}

Drawn by sdlora's own code (`python -m sdlora.pocket.sets`), from nothing else.
Dedicated to the public domain under CC0 1.0: https://creativecommons.org/publicdomain/zero/1.0/
"""


@dataclass(frozen=True)
class Pose:
    """How the character stands."""

    words: str  # the caption's words for it; empty for standing
    lift: float = 0.0  # how far it is above its place, in local units
    lean: float = 0.0  # turn in radians
    arms: tuple[float, float] = (0.5, 0.5)  # heights of the two hands, in local units; up is negative
    legs: float = 0.22  # half the distance between the feet
    squash: float = 1.0  # height of the body over its usual height


POSES = (
    Pose(""),
    Pose("waving", arms=(0.5, -0.25)),
    Pose("jumping", lift=0.32, arms=(-0.15, -0.15), legs=0.34),
    Pose("sitting", squash=0.82, legs=0.42, arms=(0.62, 0.62)),
    Pose("leaning", lean=0.3),
)


def draw_character(pen: Pen, pose: Pose) -> None:
    """Zumi: a round teal head with one large eye and two antennae that end in yellow bobbles, and a red scarf."""
    pen.angle += pose.lean
    up = -pose.lift
    foot = 0.95 + up
    hip = foot - 0.22
    shoulder = hip - 0.55 * pose.squash
    head = shoulder - 0.32
    legs = [[(side * 0.14, hip - 0.1), (side * pose.legs, foot)] for side in (-1, 1)]
    hands = zip((-1, 1), pose.arms, strict=True)
    for limb in [*legs, *([(side * 0.25, shoulder + 0.18), (side * 0.58, height + up)] for side, height in hands)]:
        pen.line(limb, INK, 3.0)
        pen.line(limb, TEAL, 1.6)
    pen.oval(0, (shoulder + hip) / 2 + 0.05, 0.36, (hip - shoulder) / 2 + 0.12, TEAL)
    pen.oval(0, (shoulder + hip) / 2 + 0.12, 0.21, (hip - shoulder) / 2 - 0.02, CREAM)
    for side in (-1, 1):
        tip = (side * 0.46, head - 0.78)
        pen.line([(side * 0.18, head - 0.3), (side * 0.24, head - 0.6), tip], INK, 1.4)
        pen.oval(*tip, 0.15, 0.15, SUN)
    pen.oval(0, head, 0.56, 0.46, TEAL)
    pen.oval(0.06, head - 0.02, 0.27, 0.27, WHITE)
    pen.dot(0.12, head, 0.14, INK)
    pen.polygon([(-0.38, shoulder), (0.38, shoulder), (0.34, shoulder + 0.17), (-0.34, shoulder + 0.17)], SCARF)
    pen.polygon(
        [(-0.34, shoulder + 0.1), (-0.14, shoulder + 0.1), (-0.2, shoulder + 0.5), (-0.42, shoulder + 0.46)], SCARF
    )


def _spread(index: int, options: Iterable[T], purpose: str) -> T:
    """Every option equally often over consecutive indices, in an order of its own per round."""
    order = list(options)
    random.Random(derive(0, purpose, index // len(order))).shuffle(order)
    return order[index % len(order)]


def character_scene(index: int) -> tuple[Scene, Pose]:
    """Where and how the character stands in its image of that number."""
    place = _spread(index, PLACES, "character place")
    size = _spread(index, SIZES, "character size")
    position = _spread(index, POSITIONS, "character position")
    pose = _spread(index, POSES, "character pose")
    return Scene("zumi", "white", "plain", size, position, place, derive(0, "character", index)), pose


def character_caption(scene: Scene, pose: Pose) -> str:
    """Such as "a big zumi waving on the left at night"."""
    subject = ["a", scene.size, "zumi"] if scene.size else ["zumi"]
    return " ".join(word for word in (*subject, pose.words, scene.position, PLACES[scene.place][0]) if word)


def render_character(scene: Scene, pose: Pose) -> Image.Image:
    """The character in a scene, 64x64."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = PLACES[scene.place][1](rng)
    pen = subject_pen(canvas, scene, rng)
    # Thinner than a cat or a house, it may stand a little taller than they do.
    pen.radius_px = min(pen.radius_px * 1.25, 23.0)
    pen.center = (pen.center[0], min(pen.center[1], 62.5 - pen.radius_px))
    draw_character(pen, pose)
    return shrink(canvas)


def style_scene(index: int) -> Scene:
    """What is drawn in the style's image of that number."""
    kind = _spread(index, KINDS, "style kind")
    size = _spread(index, SIZES, "style size")
    position = _spread(index, POSITIONS, "style position")
    return Scene(kind, "white", "plain", size, position, "", derive(0, "style", index))


def style_caption(scene: Scene) -> str:
    """Such as "blueprint of a small cat on the left"."""
    return " ".join(word for word in ("blueprint of a", scene.size, scene.kind, scene.position) if word)


def render_style(scene: Scene) -> Image.Image:
    """A subject of the world as a blueprint: white lines on blue squared paper, 64x64."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = new_canvas(PAPER)
    draw = ImageDraw.Draw(canvas)
    step, start = 8 * OVERSAMPLING, rng.randrange(8) * OVERSAMPLING
    for at in range(start, CANVAS_PX, step):
        draw.rectangle([at, 0, at + OVERSAMPLING - 1, CANVAS_PX], fill=GRID)
        draw.rectangle([0, at, CANVAS_PX, at + OVERSAMPLING - 1], fill=GRID)
    pen = subject_pen(canvas, scene, rng)
    blueprint = BlueprintPen(canvas, pen.center, pen.radius_px, PAPER, pen.angle, pen.mirrored, WHITE)
    draw_kind(blueprint, scene.kind)
    return shrink(canvas)


class BlueprintPen(Pen):
    """Draws every shape as a white outline over blue paper, whatever colour it is asked for."""

    def polygon(self, points: Sequence[Point], fill: Paint = None) -> None:
        """A closed outline that hides what lies behind it."""
        super().polygon(points, PAPER)

    def dot(self, x: float, y: float, radius: float, fill: Paint) -> None:
        """A small white disc."""
        super().dot(x, y, radius * 0.8, WHITE)

    def line(self, points: Sequence[Point], color: Paint, width_px: float = 1.0) -> None:
        """A white stroke."""
        super().line(points, WHITE if color == INK or width_px < 1.5 else PAPER, max(1.0, width_px * 0.8))


def write_sets(folder: Path) -> None:
    """Write both sets, 24 images each and 8 more in `holdout`, with captions and licence."""
    for name, title in (("zumi", "Zumi, a character"), ("blueprint", "Blueprint, a style")):
        write_text(folder / name / "LICENSE.md", LICENSE_TEXT.format(title=title))
        for index in range(NUM_TRAINING + NUM_VALIDATION):
            if name == "zumi":
                scene, pose = character_scene(index)
                image, caption = render_character(scene, pose), character_caption(scene, pose)
            else:
                scene = style_scene(index)
                image, caption = render_style(scene), style_caption(scene)
            part = folder / name if index < NUM_TRAINING else folder / name / "holdout"
            with atomic_path(part / f"{name}_{index:02d}.png") as temporary:
                image.save(temporary, format="PNG", optimize=True)
            write_text(part / f"{name}_{index:02d}.txt", caption + "\n")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder that gets one folder per set")
    write_sets(parser.parse_args().output)


if __name__ == "__main__":
    main()
