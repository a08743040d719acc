"""How often the copy check takes fresh images for copies, and how often it finds copies that the base model redrew.

Fresh renders of each concept, half of them from the captions of three training images and half from captions that are
in no set, stand for the previews of an adapter that has learned the concept and copies nothing. Sets of 4 to 24
training images, with and without eight validation images, give the scale (`sdlora.copycheck.scale`). "crisp" compares
the renders as they are, and a copy counts as identical; "through the VAE" sends them, with noisy latents, through that
of the built-in base, behind which the training images are compared as well. A run has four epochs of independent
previews, the worst case: real ones repeat their seeds.

    python tests/benchmarks/copy_scale.py --docs docs/measurements
    python tests/benchmarks/copy_scale.py --redrawn --docs docs/measurements
    python tests/benchmarks/copy_scale.py --photos FOLDER...

With --redrawn, copies are training images that the base model went on to draw from a share of the noise, and fresh
images are redrawn in the same way. With --photos, folders of photographs of one subject each, copies are squares cut
out of photographs of several shapes, every second one mirrored, and the other photographs of a subject are the fresh
images; they are compared without the base model.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from concepts import ALL_CONCEPTS, NUM_TRAINING, NUM_VALIDATION, Concept, make_creature
from copy_sets import CREATURE_SEEDS, _draw_creature
from diffusers import StableDiffusionImg2ImgPipeline
from estimates import clopper_pearson
from generate import GUIDANCE, load_pipeline
from PIL import Image, ImageFilter, ImageOps
from timesteps_report import between
from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import pocket_folder
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.features import Features, feature_block
from sdlora.copycheck.scale import ALPHA, NEW_SHARE, OWN_SHARE, SAME_PICTURE, Scale, measures
from sdlora.copycheck.similarity import hp_ms
from sdlora.copycheck.statistics import normal_tail
from sdlora.copycheck.verdict import FULL, Match, judge
from sdlora.data.dataset import Example
from sdlora.data.images import to_tensor
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base

CELLS = ((4, 0), (8, 0), (12, 0), (24, 0), (4, 8), (12, 8), (24, 8))
EPOCHS, PREVIEWS, CAPTIONS, RUNS = 4, 6, 3, 1000
NOISE = 0.15  # of the latents' standard deviation
PLAIN = Embedders()


@dataclass(frozen=True)
class Compared:
    """A concept's first training images, with what compares others with them.

    Attributes:
        training: The images, behind the VAE if the others are.
        embedders: With the base model's UNet, fitted to the images.
        copies: The images as a copy of them would be drawn.
        validation: The highest measures of validation images, (8, M).
        base: None if images are compared as they are.
    """

    training: list[Image.Image]
    embedders: Embedders
    copies: list[Image.Image]
    validation: Tensor
    base: BaseModel | None

    @staticmethod
    def of(concept: Concept, base: BaseModel, count: int, *, behind_vae: bool = True) -> Compared:
        """The first `count` training images of a concept."""
        training = [concept.draw(index, 0)[0] for index in range(count)]
        held = [concept.draw(index, 0)[0] for index in range(NUM_TRAINING, NUM_TRAINING + NUM_VALIDATION)]
        copies = training
        if behind_vae:
            training, held = through(base, training, 0.0), through(base, held, 0.0)
            copies = through(base, training, 0.0)
        block = feature_block(base.network)
        assert block is not None, "it is a UNet"
        features = Features(base, block, "", nullcontext, Example("", Path(), "", (64, 64), (64, 64)))
        with tempfile.TemporaryDirectory() as folder:
            deque(features.fit(training, Cache(Path(folder), base)), maxlen=0)
            embedders = Embedders(features=features)
            validation = measures(embedders.scores(held, training), embedders.score_names).amax(dim=1)
        return Compared(training, embedders, copies, validation, base if behind_vae else None)

    def measured(self, images: list[Image.Image]) -> Tensor:
        """The measures of images with the training images, (P, G, M)."""
        return measures(self.embedders.scores(images, self.training), self.embedders.score_names)

    @functools.cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        """The highest measures of training images with the others, and those of copies."""
        scores = self.embedders.scores(self.training, self.training)
        among = measures(scores, self.embedders.score_names)
        among[(scores[..., 0] >= SAME_PICTURE) | torch.eye(len(scores), dtype=torch.bool)] = -torch.inf
        highest = among.amax(dim=1)
        copy = self.measured(self.copies).diagonal(dim1=0, dim2=1).T.mean(dim=0)
        return highest[torch.isfinite(highest).all(dim=1)], copy

    def scale(self, held: int) -> Scale:
        """The scale with some of the validation images."""
        among, copy = self._own
        return Scale(torch.cat([among, self.validation[:held]]), copy, torch.empty(0))

    def significant(self, images: list[Image.Image], is_new: Sequence[bool], held: int = 0) -> list[bool]:
        """Whether images are significant, each from a new prompt or from a training caption."""
        return significant(self.measured(images), is_new, self.scale(held))


def significant(found: Tensor, is_new: Sequence[bool], scale: Scale) -> list[bool]:
    """Which measures, (P, G, M), are significant on a scale."""
    shares = torch.tensor([NEW_SHARE if new else OWN_SHARE for new in is_new])
    highest = scale.z_scores(found, shares).amax(dim=1)
    return (found.shape[-1] * normal_tail(highest) <= ALPHA).tolist()


@torch.no_grad()
def through(base: BaseModel, images: Sequence[Image.Image], noise: float) -> list[Image.Image]:
    """Images encoded and decoded, with noise on their latents in units of those's standard deviation."""
    moments = base.encode_pixels(torch.stack([to_tensor(image.convert("RGB")) for image in images]))
    latents = base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
    latents = latents + noise * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return base.decode_latents(latents)


class Rates(NamedTuple):
    """Shares of fresh previews that are significant, of epochs called "watch", and of runs called "copying"."""

    previews: float
    watch: float
    copying: float


def fresh_measures(compared: Compared, concept: Concept, num_new: int = 60) -> tuple[Tensor, Tensor]:
    """The measures of two further renders of every training caption, and of renders of other captions."""
    first = NUM_TRAINING + NUM_VALIDATION
    own = [concept.draw(index, take)[0] for take in (1, 2) for index in range(len(compared.training))]
    new = [concept.draw(index, 0)[0] for index in range(first, first + num_new)]
    if compared.base is not None:
        own, new = through(compared.base, own, NOISE), through(compared.base, new, NOISE)
    return compared.measured(own), compared.measured(new)


def rates(own_measures: Tensor, new_measures: Tensor, scale: Scale, seed: int = 0) -> Rates:
    """What becomes of runs whose previews are fresh images; more are drawn where the product would draw more."""
    draws = np.random.default_rng(seed)
    own = np.array(significant(own_measures, [False] * len(own_measures), scale)).reshape(2, -1)
    new = np.array(significant(new_measures, [True] * len(new_measures), scale))
    verdict = {k: judge(_matches(k, PREVIEWS), []).verdict for k in range(PREVIEWS + 1)}
    later = {k: judge(_matches(k, FULL), []).verdict for k in range(FULL + 1)}
    watched = copied = 0
    for _ in range(RUNS):
        captions, called = draws.choice(own.shape[1], CAPTIONS, replace=False), False
        for _ in range(EPOCHS):
            found = _count(draws, own[:, captions], new, PREVIEWS)
            told = verdict[found]
            if told == "watch":
                told = later[found + _count(draws, own[:, captions], new, FULL - PREVIEWS)]
            watched, called = watched + (told == "watch"), called or told == "copying"
        copied += called
    return Rates(float(np.concatenate([own.flatten(), new]).mean()), watched / RUNS / EPOCHS, copied / RUNS)


def concept_rates(concept: Concept, base: BaseModel, *, behind_vae: bool) -> dict[tuple[int, int], Rates]:
    """The rates of all cells for one concept."""
    found: dict[tuple[int, int], Rates] = {}
    for count in dict.fromkeys(count for count, _ in CELLS):
        compared = Compared.of(concept, base, count, behind_vae=behind_vae)
        own, new = fresh_measures(compared, concept)
        found |= {cell: rates(own, new, compared.scale(cell[1])) for cell in CELLS if cell[0] == count}
    return found


def _count(draws: np.random.Generator, own: np.ndarray, new: np.ndarray, count: int) -> int:
    return int(draws.choice(own.flatten(), count // 2).sum() + draws.choice(new, count - count // 2).sum())


def _matches(significant: int, total: int) -> list[Match]:
    return [Match("", "novel", 0, "", 0.0, 0.0, 0.0, index < significant, "") for index in range(total)]


def table(found: dict[str, list[dict[tuple[int, int], Rates]]]) -> list[str]:
    """Rows of the page: mean over the concepts, and the highest of them."""
    lines = [
        "| Training images | validation images | drawn | previews significant | epochs `watch` | runs `copying` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, concepts in found.items():
        for cell in concepts[0]:
            figures = []
            for name in Rates._fields:
                values = [getattr(rates[cell], name) for rates in concepts]
                figures.append(f"{np.mean(values):.1%} (highest {max(values):.1%})")
            lines.append(f"| {cell[0]} | {cell[1]} | {kind} | " + " | ".join(figures) + " |")
    return lines


# --- Photographs ---------------------------------------------------------------------------------------------------

SHAPES = {"1:1": (1, 1), "4:5": (4, 5), "2:3": (2, 3), "16:9": (16, 9)}


def photographs(folders: Sequence[Path]) -> list[str]:
    """For every shape of the training images: square copies found, and other photographs taken for copies."""
    lines = ["| Training images | copies found | other photographs significant |", "| --- | --- | --- |"]
    for shape, (width, height) in SHAPES.items():
        hits, alarms, copies, others = 0, 0, 0, 0
        for folder in folders:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
            images = [_cut(Image.open(file).convert("RGB").resize((384, 384)), width, height) for file in files]
            short = min(images[0].size)
            squares = [_square(image, short, place=0.3).filter(ImageFilter.GaussianBlur(1)) for image in images]
            squares = [ImageOps.mirror(image) if index % 2 else image for index, image in enumerate(squares)]
            among = measures(PLAIN.scores(images, images), PLAIN.score_names)
            among[torch.eye(len(images), dtype=torch.bool)] = -torch.inf
            twins = (hp_ms(images, images).fill_diagonal_(0) >= SAME_PICTURE).any(dim=1)
            found = measures(PLAIN.scores(squares, images), PLAIN.score_names)
            for index in range(len(images)):
                kept = [other for other in range(len(images)) if other != index and not twins[other]]
                if len(kept) < 2:
                    continue
                scale = Scale(
                    among[kept][:, kept].amax(dim=1), measures(torch.ones(2), PLAIN.score_names), torch.empty(0)
                )
                hits, copies = hits + significant(found[[index]][:, [*kept, index]], [True], scale)[0], copies + 1
                if not twins[index]:
                    alarms += significant(found[[index]][:, kept], [True], scale)[0]
                    others += 1
        lines.append(f"| {shape} | {hits} of {copies} | {alarms} of {others} |")
    return lines


def _cut(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(image.width / width, image.height / height)
    size = int(width * scale), int(height * scale)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _square(image: Image.Image, edge: int, place: float) -> Image.Image:
    left, top = int((image.width - edge) * place), int((image.height - edge) * place)
    return image.crop((left, top, left + edge, top + edge))


# --- Copies that the base model redrew -----------------------------------------------------------------------------

STRENGTHS = (0.2, 0.3, 0.4)
STEPS = 10
NUM_CREATURES = 8


def redrawn(concept: Concept, base: BaseModel, count: int) -> dict[str, list[bool]]:
    """Which of a concept's redrawn images are significant, by what they were drawn from.

    Copies of the first training images count as drawn from a new prompt in one half and from a caption in the other.
    """
    compared = Compared.of(concept, base, count)
    copied = [concept.draw(index, 0) for index in range(count)]
    sources = {
        **{f"copies, redrawn at {strength}": (copied, strength) for strength in STRENGTHS},
        "fresh, of training captions, redrawn at 0.3": ([concept.draw(i, 1) for i in range(NUM_TRAINING)], 0.3),
        "fresh, of other captions, redrawn at 0.3": ([concept.draw(i, 0) for i in range(40, 40 + NUM_TRAINING)], 0.3),
    }  # fmt: skip
    found = {}
    for name, (drawn, strength) in sources.items():
        images = _redraw([image for image, _ in drawn], [caption for _, caption in drawn], strength)
        is_new = [index % 2 == 0 if name.startswith("copies") else "other" in name for index in range(len(images))]
        found[name] = compared.significant(images, is_new)
    return found


@functools.cache
def _pipeline() -> Any:
    pipeline = StableDiffusionImg2ImgPipeline(
        **load_pipeline(pocket_folder()).components, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _redraw(images: list[Image.Image], captions: list[str], strength: float) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(index) for index in range(len(images))]
    drawn: list[Image.Image] = _pipeline()(
        captions, image=images, strength=strength, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=generators,
    ).images  # fmt: skip
    return drawn


def redrawn_table(base: BaseModel, concepts: Sequence[Concept], counts: Sequence[int]) -> list[str]:
    """Rows of the page: found among all, with and without the concept that the base redraws worst."""
    lines = ["| Images | Training images | " + " | ".join(c.name for c in concepts) + " | all |"]
    lines.append("| --- | --- |" + " --- |" * (len(concepts) + 1))
    for count in counts:
        by_concept = [redrawn(concept, base, count) for concept in concepts]
        for name in by_concept[0]:
            shares = [found[name] for found in by_concept]
            cells = [f"{np.mean(values):.0%}" for values in shares]
            together = [value for values in shares for value in values]
            low, high = clopper_pearson(sum(together), len(together))[1:]
            lines.append(
                f"| {name} | {count} | {' | '.join(cells)} | {np.mean(together):.1%} ({low:.1%} to {high:.1%}) |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="the folder of the page to fill")
    parser.add_argument("--photos", type=Path, nargs="+", help="folders of photographs, one for each subject")
    parser.add_argument("--redrawn", action="store_true", help="copies that the base model redrew")
    parser.add_argument("--json", action="store_true", help="print the rates of every concept")
    arguments = parser.parse_args()
    base = load_base(str(pocket_folder()), device=torch.device("cpu"), dtype=torch.float32)
    if arguments.photos:
        name, lines = "photographs", photographs(arguments.photos)
    elif arguments.redrawn:
        creatures = [
            Concept(f"creature {seed}", partial(_draw_creature, seed, make_creature(seed)))
            for seed in CREATURE_SEEDS[:NUM_CREATURES]
        ]
        name, lines = "redrawn", redrawn_table(base, [*ALL_CONCEPTS.values(), *creatures], (8, 24))
    else:
        name = "fresh"
        found: dict[str, list[dict[tuple[int, int], Rates]]] = {"crisp": [], "through the VAE": []}
        for kind in found:
            for concept in ALL_CONCEPTS.values():
                found[kind].append(concept_rates(concept, base, behind_vae=kind != "crisp"))
                if arguments.json:
                    told = {str(cell): rates for cell, rates in found[kind][-1].items()}
                    print(json.dumps([concept.name, kind, told]), flush=True)
        lines = table(found)
    print("\n".join(lines))
    if arguments.docs:
        page = arguments.docs / "copy-check.md"
        page.write_text(between(page.read_text(encoding="utf-8"), name, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
