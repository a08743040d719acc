"""How often parts of photographs are found in other images, and how often they are seen where there are none.

The subject of a photograph is cut out (GrabCut) and put into a stranger's photograph, in its place or moved, scaled and
mirrored; or the background is kept, with a stranger's subject in place of its own. Every image is bent and degraded a
little. The photograph's set is all photographs of its subject. Where there are no parts: every photograph, compared
with the others of its subject.

    python tests/benchmarks/copy_parts.py FOLDER...

with one folder of photographs for each subject. It needs OpenCV.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from copy_sets import IMAGE_SUFFIXES, degrade, jitter, warp
from estimates import clopper_pearson
from PIL import Image, ImageFilter, ImageOps

from sdlora.copycheck.parts import PartFinder

EDGE_PX = 384
CUT_PX = 256
BEND = 0.015
SHARES = (0.05, 0.75)  # of a photograph that a subject covers, outside which the cut has failed
FAMILIES = ("the whole", "subject, new background", "subject moved", "background, other subject")
NO_PART = "other photographs of the subject"
Photo = tuple[Image.Image, Image.Image]


def read(folder: Path) -> list[Photo]:
    """The photographs of a folder with the masks of their subjects."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    images = [ImageOps.fit(Image.open(file).convert("RGB"), (EDGE_PX, EDGE_PX)) for file in files]
    return [(image, cut(image)) for image in images]


def cut(image: Image.Image) -> Image.Image:
    """The mask of what lies in the middle of an image (Rother et al. 2004, "GrabCut")."""
    pixels = np.asarray(image.resize((CUT_PX, CUT_PX)))[:, :, ::-1].copy()
    found = np.zeros(pixels.shape[:2], np.uint8)
    margin = CUT_PX // 8
    inner = (margin, margin, CUT_PX - 2 * margin, CUT_PX - 2 * margin)
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, found, inner, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
    mask = Image.fromarray((found % 2 * 255).astype(np.uint8)).resize(image.size)  # odd values are the subject
    return mask.filter(ImageFilter.MedianFilter(9)).filter(ImageFilter.GaussianBlur(1.5))


def made(photo: Photo, other: Photo, draw: random.Random) -> Iterator[Image.Image]:
    """An image of each family."""
    (image, mask), (page, its_mask) = photo, other
    yield image
    placed = page.copy()
    placed.paste(image, (0, 0), mask)
    yield placed
    moved, edge, reach = page.copy(), int(EDGE_PX * draw.uniform(0.6, 1.0)), EDGE_PX // 6
    corner = draw.randint(-reach, EDGE_PX - edge + reach), draw.randint(-reach, EDGE_PX - edge + reach)
    subject, its_shape = (ImageOps.mirror(part).resize((edge, edge)) for part in (jitter(image, draw), mask))
    moved.paste(subject, corner, its_shape)
    yield moved
    kept = image.copy()
    kept.paste(image.filter(ImageFilter.GaussianBlur(EDGE_PX // 12)), (0, 0), mask.filter(ImageFilter.MaxFilter(9)))
    kept.paste(page, (0, 0), its_mask)
    yield kept


def measure(photos: dict[str, list[Photo]]) -> dict[str, list[bool]]:
    """Whether a part was found, by family and for photographs that show none."""
    found: dict[str, list[bool]] = {name: [] for name in (*FAMILIES, NO_PART)}
    for subject, own in photos.items():
        names = {str(index): image for index, (image, _) in enumerate(own)}
        finder = PartFinder(names)
        for index, photo in enumerate(own):
            rest = PartFinder({name: image for name, image in names.items() if name != str(index)})
            found[NO_PART].append(rest.find(photo[0]) is not None)
            draw = random.Random(f"{subject} {index}")
            stranger = draw.choice([other for other in photos if other != subject])
            if SHARES[0] < np.asarray(photo[1]).mean() / 255 < SHARES[1]:
                images = made(photo, draw.choice(photos[stranger]), draw)
                for family, image in zip(FAMILIES, images, strict=True):
                    part = finder.find(degrade(warp(image, draw, BEND), draw))
                    found[family].append(part is not None and part.name == str(index))
        print(subject, {name: f"{sum(hits)} of {len(hits)}" for name, hits in found.items()}, flush=True)
    return found


def table(found: dict[str, list[bool]]) -> list[str]:
    """Rows of the page."""
    lines = ["| Images | how many | called a part of the right photograph |", "| --- | --- | --- |"]
    for name, hits in found.items():
        share = clopper_pearson(sum(hits), len(hits))
        lines.append(f"| {name} | {len(hits)} | {share.value:.0%} ({100 * share.low:.0f} to {100 * share.high:.0f}) |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", help="folders of photographs, one for each subject")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    lines = table(measure({folder.name: read(folder) for folder in arguments.photos}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
