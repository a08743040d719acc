"""How far apart near-duplicates and different images are: the figures behind `sdlora.data.duplicates.MIN_CORRELATION`.

`python tests/benchmarks/duplicates.py --first 10000 --images 4000` takes half a minute.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from sdlora.common.bundled import resolve_data_folder, shipped_sets
from sdlora.data.duplicates import MIN_CORRELATION, SIZE_PX, thumbnail
from sdlora.data.images import load_image
from sdlora.pocket.world import COLORS, random_scene, render


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def warmer(image: Image.Image) -> Image.Image:
    factors = zip(image.split(), (1.06, 1.0, 0.94), strict=True)
    return Image.merge("RGB", [band.point(lambda value, f=f: min(255, value * f)) for band, f in factors])


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: resized(image, 0.5),
    "three quarters of the size": lambda image: resized(image, 0.75),
    "four times the size": lambda image: resized(image, 4),
    "JPEG of quality 80": lambda image: jpeg(image, 80),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "10 % less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "20 % less colour": lambda image: ImageEnhance.Color(image).enhance(0.8),
    "warmer": warmer,
    "mirrored": ImageOps.mirror,
}
HARD: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 50": lambda image: jpeg(image, 50),
    "all but the outer 2.5 %": lambda image: ImageOps.crop(image, round(image.width * 0.025)),
}


def mirrored(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    return thumbnails.reshape(-1, SIZE_PX, SIZE_PX, 3)[:, :, ::-1].reshape(thumbnails.shape)


def copies(images: list[Image.Image], change: Callable[[Image.Image], Image.Image]) -> NDArray[np.float32]:
    """The correlation of each image with its changed copy."""
    before = np.stack([thumbnail(image) for image in images])
    after = np.stack([thumbnail(change(image)) for image in images])
    return np.maximum((before * after).sum(axis=1), (before * mirrored(after)).sum(axis=1))


def pairs(images: list[Image.Image]) -> NDArray[np.float32]:
    """The correlations of all pairs, ascending."""
    found = np.stack([thumbnail(image) for image in images])
    scores = np.maximum(found @ found.T, mirrored(found) @ found.T)
    return np.sort(scores[np.triu_indices(len(found), 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=10_000, help="Number of the first scene.")
    parser.add_argument("--images", type=int, default=4000, help="How many scenes are drawn.")
    options = parser.parse_args()
    scenes = [random_scene(number) for number in range(options.first, options.first + options.images)]
    images = [render(scene) for scene in scenes]
    scores = pairs(images)
    alike = (scores >= MIN_CORRELATION).sum()
    print(f"different scenes: {len(scores)} pairs, highest {scores[-3:].round(4)}, {alike} alike")
    for name, change in {**COPIES, **HARD}.items():
        found = copies(images[:1000], change)
        print(f"{name}: lowest {found.min():.4f}, {np.mean(found >= MIN_CORRELATION):.1%} alike")
    chosen = random.Random(0)
    others = [replace(s, color=chosen.choice([c for c in COLORS if c != s.color])) for s in scenes[:1000]]
    recoloured = iter(render(scene) for scene in others)
    found = copies(images[:1000], lambda _: next(recoloured))
    print(f"the subject in another colour: {np.mean(found >= MIN_CORRELATION):.1%} alike")
    for name in shipped_sets():
        files = sorted(resolve_data_folder(f"builtin:{name}").glob("*.png"))
        print(f"{name}: highest {pairs([load_image(file, 'white') for file in files])[-1]:.4f}")


if __name__ == "__main__":
    main()
