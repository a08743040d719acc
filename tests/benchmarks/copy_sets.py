"""Images whose truth is known by construction: copies in eight families, and others that are none in tiers.

Used by `copy_pairs`. Every random number comes from a purpose and counters, so that the same call draws the same.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from concepts import CONCEPTS, ROUND, Concept, Creature, Drawn, make_creature, render_creature
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from sdlora.common.seeds import derive
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.pocket import sets, world

GALLERY = 24
PHOTO_PX = 256
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CREATURE_SEEDS = (2, 3, 4, 5, 6, 8, 9, 10, *range(101, 117))  # beside kolo's 1 and mirba's 7
RECOMPOSED = "recomposed"
Painter = Callable[[random.Random], Image.Image]

# --- Families of copies --------------------------------------------------------------------------------------------


def crop(image: Image.Image, share: float, draw: random.Random) -> Image.Image:
    """A square part with that share of the edge, anywhere, at the old size."""
    edge = round(image.width * share)
    left, top = draw.randint(0, image.width - edge), draw.randint(0, image.height - edge)
    return image.crop((left, top, left + edge, top + edge)).resize(image.size, Image.Resampling.BICUBIC)


def jitter(image: Image.Image, draw: random.Random, reach: float = 0.3) -> Image.Image:
    """Brightness, contrast and saturation changed by up to that share."""
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(1 + draw.uniform(-reach, reach))
    return image


def warp(image: Image.Image, draw: random.Random, reach: float = 0.05) -> Image.Image:
    """Bent smoothly: nine knots, each moved by up to that share of the edge both ways, with a cubic in between."""
    knots = torch.tensor([[[[draw.uniform(-1, 1) for _ in range(3)] for _ in range(3)] for _ in range(2)]])
    size = (image.height, image.width)
    moved = 2 * reach * F.interpolate(knots, size=size, mode="bicubic", align_corners=True)  # the edge is -1 .. 1
    still = F.affine_grid(torch.eye(2, 3).unsqueeze(0), [1, 3, *size], align_corners=False)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
    bent = F.grid_sample(
        pixels, still + moved.permute(0, 2, 3, 1), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return Image.fromarray(bent[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def degrade(image: Image.Image, draw: random.Random) -> Image.Image:
    """A little blur, noise, JPEG and tone, as a model that draws from memory would add."""
    image = jitter(image, draw, 0.1)
    image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.004, 0.008) * image.width))
    noise = np.random.default_rng(draw.getrandbits(64)).normal(0, draw.uniform(2, 6), (*image.size[::-1], 3))
    noisy = Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    noisy.save(file, "JPEG", quality=draw.randint(60, 90))
    return Image.open(file).convert("RGB")


FAMILIES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "exact": lambda image, _: image,
    "flip": lambda image, _: ImageOps.mirror(image),
    "crop 80": lambda image, draw: crop(image, 0.8, draw),
    "crop 60": lambda image, draw: crop(image, 0.6, draw),
    "jitter": lambda image, draw: jitter(image, draw),
    "combined": lambda image, draw: jitter(crop(ImageOps.mirror(image), 0.7, draw), draw),
    "warp": lambda image, draw: warp(image, draw),
}

# --- Groups: a gallery, and images that are not in it -------------------------------------------------------------

SAME, CAPTION, UNRELATED = "same subject", "same caption", "unrelated"
Many = Callable[[int], list[Image.Image]]


@dataclass(frozen=True)
class Group:
    """A gallery and what it is asked about.

    Attributes:
        subject: No threshold is tested on the subject it was set on.
        gallery: 24 images.
        own: The first so many of the gallery are the subject's, and copies are made of these.
        captions: One for each of them; none for photographs.
        others: By tier, a count to at most so many images that are no copies.
        recomposed: A number below `own`, and one to vary it, to that image's subject in another place, if possible.
    """

    subject: str
    gallery: list[Image.Image]
    own: int
    captions: list[str]
    others: dict[str, Many]
    recomposed: Callable[[int, int], Image.Image] | None

    def copy(self, family: str, number: int) -> Image.Image:
        """The copy of that family and number, degraded a little."""
        draw = random.Random(derive(0, "copy", self.subject, family, number))
        index = number % self.own
        if family == RECOMPOSED:
            assert self.recomposed is not None
            return degrade(self.recomposed(index, number), draw)
        return degrade(FAMILIES[family](self.gallery[index], draw), draw)


def world_groups() -> list[Group]:
    """The benchmarks' four concepts and 24 more creatures, each with its own training images."""
    creatures = [
        Concept(f"creature {seed}", partial(_draw_creature, seed, make_creature(seed))) for seed in CREATURE_SEEDS
    ]
    return [_world_group(concept) for concept in (*CONCEPTS.values(), *creatures)]


def _draw_creature(seed: int, creature: Creature, index: int, take: int) -> Drawn:
    scene, pose = sets.character_scene(ROUND * 1000 * seed + index)
    if take > 0:
        scene = replace(scene, seed=derive(0, "fresh render", scene.seed, take))
    return render_creature(scene, pose, creature), sets.character_caption(scene, pose)


def _world_group(concept: Concept) -> Group:
    def same(count: int) -> list[Image.Image]:
        return [concept.draw(GALLERY + number, 0)[0] for number in range(count)]

    def caption(count: int) -> list[Image.Image]:
        return [concept.draw(number % GALLERY, 1 + number // GALLERY)[0] for number in range(count)]

    def unrelated(count: int) -> list[Image.Image]:
        return [
            world.render(world.random_scene(derive(0, "unrelated", concept.name, number))) for number in range(count)
        ]

    def recomposed(index: int, number: int) -> Image.Image:
        draw = random.Random(derive(0, "recomposed", concept.name, number))
        with patch.dict(world.PLACES, {name: (words, _instead(old, draw)) for name, (words, old) in PLACES.items()}):
            return concept.draw(index, 0)[0]

    return Group(
        concept.name, [concept.draw(index, 0)[0] for index in range(GALLERY)], GALLERY, concept.training_captions(),
        {CAPTION: caption, SAME: same, UNRELATED: unrelated},
        None if concept.name == "blueprint" else recomposed,  # its paper is a part of the style
    )  # fmt: skip


PLACES = dict(world.PLACES)


def _instead(old: Painter, draw: random.Random) -> Painter:
    """Another place, after the old one has used up its random numbers, so that the subject stays as it was."""
    other = draw.choice([paint for _, paint in PLACES.values() if paint is not old])

    def paint(rng: random.Random) -> Image.Image:
        old(rng)
        return other(draw)

    return paint


# --- Photographs ---------------------------------------------------------------------------------------------------


def photo_groups(folders: Sequence[Path], mixed: bool = False) -> tuple[list[Group], int]:
    """Two groups per subject, each with one half of its photographs in the gallery and the other half outside.

    By the names of the files the halves are the first and the last, because neighbours are often one shot taken twice.

    The gallery is filled up with photographs of other subjects. A subject is a subfolder and called FOLDER/SUBFOLDER;
    a file beside them belongs to the subject that its name begins with, up to the first digit, space, dash or
    underscore.

    Args:
        folders: Where the photographs are.
        mixed: Every second photograph is in either half instead, and shots taken twice are mostly in both.

    Returns:
        The groups, and how many near-duplicates within a subject were left out.

    Raises:
        ValueError: There are fewer than 25 photographs, or fewer than two subjects with two of them.
    """
    found: dict[str, list[Image.Image]] = {}
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*"))]
    for folder, file in files:
        if file.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        beside = file.parent == folder
        name = re.split(r"[\d _-]", file.stem, maxsplit=1)[0] if beside else str(file.parent.relative_to(folder))
        with Image.open(file) as opened:
            image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (PHOTO_PX, PHOTO_PX))
        found.setdefault(f"{folder.name}/{name}", []).append(image)
    num_left_out = 0
    for images in found.values():
        again = {place for group in near_duplicates(np.stack([thumbnail(p) for p in images])) for place in group[1:]}
        images[:] = [image for place, image in enumerate(images) if place not in again]
        num_left_out += len(again)
    subjects = [name for name, images in found.items() if len(images) > 1]
    num = sum(map(len, found.values()))
    if len(subjects) < 2 or num <= GALLERY:
        raise ValueError(
            f"{', '.join(map(str, folders))}: {num} different photographs, {len(subjects)} subjects with two or more; "
            f"at least {GALLERY + 1} and two are needed, each subject in a subfolder of its own."
        )
    return [_photo_group(found, subject, half, mixed) for subject in subjects for half in (0, 1)], num_left_out


def _photo_group(found: dict[str, list[Image.Image]], subject: str, half: int, mixed: bool) -> Group:
    images = found[subject]
    middle = len(images) // 2
    halves = (images[0::2], images[1::2]) if mixed else (images[:middle], images[middle:])
    own, outside = halves[1 - half][:GALLERY], halves[half]
    strangers = [image for name, images in found.items() if name != subject for image in images]
    random.Random(derive(0, "strangers", subject, half)).shuffle(strangers)
    filling, rest = strangers[: GALLERY - len(own)], strangers[GALLERY - len(own) :]

    def recomposed(index: int, number: int) -> Image.Image:
        """The middle, with a soft edge, moved into a stranger's photograph."""
        draw = random.Random(derive(0, "recomposed", subject, half, number))
        mask = Image.new("L", own[index].size)
        margin = round(0.2 * PHOTO_PX)
        ImageDraw.Draw(mask).ellipse((margin, margin, PHOTO_PX - margin, PHOTO_PX - margin), fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(0.02 * PHOTO_PX))
        page = draw.choice(strangers).copy()
        reach = round(0.15 * PHOTO_PX)
        page.paste(own[index], (draw.randint(-reach, reach), draw.randint(-reach, reach)), mask)
        return page

    return Group(
        subject, own + filling, len(own), [], {SAME: lambda count: outside[:count], UNRELATED: lambda n: rest[:n]},
        recomposed,
    )  # fmt: skip
