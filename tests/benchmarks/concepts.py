"""Concepts that the base does not know: the two shipped sets, and creatures drawn by the world's pen.

Four of them serve every benchmark, two more those of the copy check.

Each has 24 training and 8 validation images, any number of fresh renders of the same captions, and prompts that are
in no caption. Only a drawn world can give these: a fresh render is a true independent sample of the same thing.

    python tests/benchmarks/concepts.py FOLDER          writes the sets, in the layout of datasets/zumi
    python tests/benchmarks/concepts.py --sheet a.png   draws eight of each beside one another
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from sdlora.common.seeds import derive
from sdlora.pocket import sets, world
from sdlora.pocket.pen import INK, SIZE_PX, Color, Pen, arc, shade, shrink

NUM_TRAINING, NUM_VALIDATION = sets.NUM_TRAINING, sets.NUM_VALIDATION
FEW = "few"  # beside each set, one of its first images alone, which are soon known by heart
NUM_FEW = 4
OTHER_SCENES = "other_scenes"  # and one of the validation images that repeat no scene of those
# Every place, size, position and pose comes equally often in a set that starts at a multiple of this.
ROUND = 120

Drawn = tuple[Image.Image, str]


@dataclass(frozen=True)
class Concept:
    """Something to be learned.

    Attributes:
        name: Also its trigger word.
        draw: (index, take) to an image and its caption; take 0 is the set's own, others are fresh renders of it.
    """

    name: str
    draw: Callable[[int, int], Drawn]

    def training_captions(self) -> list[str]:
        """The captions of the training images, in their order."""
        return [self.draw(index, 0)[1] for index in range(NUM_TRAINING)]

    def prompts(self, count: int) -> list[str]:
        """Captions of further images, none of them in the set."""
        known = {self.draw(index, 0)[1] for index in range(NUM_TRAINING + NUM_VALIDATION)}
        found: list[str] = []
        index = NUM_TRAINING + NUM_VALIDATION
        while len(found) < count:
            prompt = self.draw(index, 0)[1]
            if prompt not in known:
                found.append(prompt)
            index += 1
        return found

    def other_scenes(self) -> list[int]:
        """The validation images that share neither place (or object) and side, mirrored or not, with the first few."""
        known = {scene_words(self.draw(index, 0)[1]) for index in range(NUM_FEW)}
        validation = range(NUM_TRAINING, NUM_TRAINING + NUM_VALIDATION)
        return [index for index in validation if scene_words(self.draw(index, 0)[1]) not in known]

    def write(self, folder: Path) -> None:
        """Write images and captions: the validation ones in `validation_folder`, the first ones in `few` as well."""
        other = self.other_scenes()
        for index in range(NUM_TRAINING + NUM_VALIDATION):
            parts = [folder if index < NUM_TRAINING else folder / "holdout"]
            parts += [folder / FEW] if index < NUM_FEW else []
            parts += [folder / OTHER_SCENES] if index in other else []
            image, caption = self.draw(index, 0)
            for part in parts:
                part.mkdir(parents=True, exist_ok=True)
                image.save(part / f"{self.name}_{index:02d}.png")
                (part / f"{self.name}_{index:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def scene_words(caption: str) -> str:
    """A caption without size and pose, its left and its right the same: what a copy shares with its image."""
    passing = {"a", *world.SIZES, *(pose.words for pose in sets.POSES)}
    words = [word for word in caption.split() if word not in passing]
    return " ".join(words).replace("on the left", "at the side").replace("on the right", "at the side")


# --- Creatures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Creature:
    """What sets one creature apart from another."""

    skin: Color
    belly: Color
    body: str
    headgear: str
    num_eyes: int
    num_legs: int
    has_tail: bool


PALETTES: list[tuple[Color, Color]] = [
    ((222, 84, 150), (252, 228, 120)),
    ((240, 140, 60), (90, 60, 130)),
    ((130, 90, 200), (170, 236, 160)),
    ((190, 206, 60), (208, 66, 60)),
    ((96, 100, 112), (250, 150, 60)),
]
BODIES, HEADGEAR = ("egg", "box", "bell", "drop"), ("ears", "horns", "crest", "leaf")


def make_creature(seed: int) -> Creature:
    """A creature as a function of a number."""
    rng = random.Random(derive(0, "creature", seed))
    skin, belly = rng.choice(PALETTES)
    return Creature(
        skin, belly, rng.choice(BODIES), rng.choice(HEADGEAR), rng.choice((1, 2, 3)), rng.choice((2, 4)),
        rng.random() < 0.5,
    )  # fmt: skip


def _outline(body: str, top: float, bottom: float) -> list[tuple[float, float]]:
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    if body == "box":
        return [(-0.5, top + 0.1), (-0.4, top), (0.4, top), (0.5, top + 0.1), (0.5, bottom), (-0.5, bottom)]
    if body == "bell":
        return [*arc(0, top + 0.42, 0.42, 0.42, 180, 360), (0.66, bottom), (-0.66, bottom)]
    if body == "drop":
        return [(0, top - 0.1), *arc(0, middle + 0.14, 0.6, half - 0.14, -50, 230)]
    return arc(0, middle, 0.54, half, 0, 360)[:-1]


def _headgear(pen: Pen, creature: Creature, top: float) -> None:
    for side in (-1, 1):
        if creature.headgear == "ears":
            pen.polygon(arc(side * 0.3, top - 0.12, 0.15, 0.42, 0, 360)[:-1], creature.skin)
            pen.polygon(arc(side * 0.3, top - 0.1, 0.06, 0.26, 0, 360)[:-1], creature.belly)
        elif creature.headgear == "horns":
            pen.polygon(
                [(side * 0.16, top + 0.14), (side * 0.66, top - 0.4), (side * 0.46, top + 0.26)], creature.belly
            )
    if creature.headgear == "crest":
        for x in (-0.3, 0.0, 0.3):
            pen.polygon([(x - 0.17, top + 0.12), (x, top - 0.42), (x + 0.17, top + 0.12)], creature.belly)
    elif creature.headgear == "leaf":
        pen.line([(0, top + 0.05), (0.05, top - 0.25)], INK, 1.4)
        pen.polygon([(0.05, top - 0.2), (0.2, top - 0.5), (0.62, top - 0.42), (0.4, top - 0.14)], (70, 170, 80))


def draw_creature(pen: Pen, pose: sets.Pose, creature: Creature) -> None:
    """A body with headgear, eyes, arms, legs and perhaps a tail, in zumi's poses."""
    pen.angle += pose.lean
    foot = 0.95 - pose.lift
    bottom = foot - 0.2
    top = bottom - 1.12 * pose.squash
    if creature.has_tail:
        tail = [(0.4, bottom - 0.12), (0.86, bottom - 0.1), (0.9, bottom - 0.5)]
        pen.line(tail, INK, 4.0)
        pen.line(tail, creature.skin, 2.4)
    stance = [-0.34, -0.12, 0.12, 0.34] if creature.num_legs == 4 else [-0.24, 0.24]
    for x in stance:
        reach = x * pose.legs / 0.22
        pen.line([(x, bottom - 0.05), (reach, foot)], INK, 3.6)
        pen.line([(x, bottom - 0.05), (reach, foot)], shade(creature.skin, -0.3), 2.0)
    for side, height in zip((-1, 1), pose.arms, strict=True):
        arm = [(side * 0.42, bottom - 0.45), (side * 0.86, height - pose.lift)]
        pen.line(arm, INK, 3.2)
        pen.line(arm, creature.skin, 1.8)
    _headgear(pen, creature, top)
    pen.polygon(_outline(creature.body, top, bottom), creature.skin)
    pen.oval(0, bottom - 0.27, 0.28, 0.2, creature.belly)
    for index in range(creature.num_eyes):
        x = (index - (creature.num_eyes - 1) / 2) * 0.3
        pen.dot(x, top + 0.45, 0.14, world.WHITE)
        pen.dot(x + 0.02, top + 0.47, 0.075, INK)


def render_creature(scene: world.Scene, pose: sets.Pose, creature: Creature) -> Image.Image:
    """The creature in a scene, 64x64, as tall as zumi would stand there."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = world.PLACES[scene.place][1](rng)
    pen = world.subject_pen(canvas, scene, rng)
    pen.radius_px = min(pen.radius_px * 1.2, 22.0)
    pen.center = (pen.center[0], min(pen.center[1], 62.5 - pen.radius_px))
    draw_creature(pen, pose, creature)
    return shrink(canvas)


# --- The concepts ---------------------------------------------------------------------------------------------------


def _take(scene: world.Scene, take: int) -> world.Scene:
    return scene if take == 0 else replace(scene, seed=derive(0, "fresh render", scene.seed, take))


def _draw_zumi(index: int, take: int) -> Drawn:
    scene, pose = sets.character_scene(index)
    return sets.render_character(_take(scene, take), pose), sets.character_caption(scene, pose)


def _draw_blueprint(index: int, take: int) -> Drawn:
    scene = sets.style_scene(index)
    return sets.render_style(_take(scene, take)), sets.style_caption(scene)


def _draw_creature(name: str, seed: int, index: int, take: int) -> Drawn:
    scene, pose = sets.character_scene(ROUND * 1000 * seed + index)
    image = render_creature(_take(scene, take), pose, CREATURES[name])
    return image, sets.character_caption(scene, pose).replace("zumi", name)


SEEDS = {"kolo": 1, "mirba": 7}
MORE_SEEDS = {"pelu": 13, "tavi": 24}
CREATURES = {name: make_creature(seed) for name, seed in {**SEEDS, **MORE_SEEDS}.items()}
CONCEPTS: dict[str, Concept] = {
    "zumi": Concept("zumi", _draw_zumi),
    "blueprint": Concept("blueprint", _draw_blueprint),
    **{name: Concept(name, partial(_draw_creature, name, seed)) for name, seed in SEEDS.items()},
}
MORE_CONCEPTS = {name: Concept(name, partial(_draw_creature, name, seed)) for name, seed in MORE_SEEDS.items()}
ALL_CONCEPTS = {**CONCEPTS, **MORE_CONCEPTS}


def write_all(folder: Path) -> None:
    """Write the sets of the four concepts that serve every benchmark, each into a folder of its name."""
    for concept in CONCEPTS.values():
        concept.write(folder / concept.name)


def sheet(concepts: list[Concept], columns: int = 8) -> Image.Image:
    """A row per concept, each image twice as large."""
    size = 2 * SIZE_PX
    page = Image.new("RGB", (columns * size, len(concepts) * size))
    for row, concept in enumerate(concepts):
        for column in range(columns):
            page.paste(concept.draw(column, 0)[0].resize((size, size)), (column * size, row * size))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the sets are written")
    parser.add_argument("--sheet", type=Path, help="where a sheet of samples is written")
    arguments = parser.parse_args()
    if arguments.folder:
        write_all(arguments.folder)
    if arguments.sheet:
        sheet(list(ALL_CONCEPTS.values())).save(arguments.sheet)


if __name__ == "__main__":
    main()
