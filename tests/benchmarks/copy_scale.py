"""How often the copy check takes fresh images for copies: crisp ones, and ones that a base model drew softly.

Fresh renders of each concept, half of them from the captions of three training images and half from captions that are
in no set, stand for the previews of an adapter that has learned the concept and copies nothing. Sets of 4 to 24
training images, with and without eight validation images, give the scale (`sdlora.copycheck.scale`). "crisp" compares
the renders as they are, and a copy counts as identical; "through the VAE" sends them, with noisy latents, through that
of the built-in base. A run has four epochs of independent previews, the worst case: real ones repeat their seeds.

    python tests/benchmarks/copy_scale.py --docs docs/measurements
    python tests/benchmarks/copy_scale.py --photos FOLDER...
    python tests/benchmarks/copy_scale.py --records docs/measurements/copy-check.jsonl

With --photos, folders of photographs of one subject each, copies are squares cut out of photographs of several shapes,
every second one mirrored, and the other photographs of a subject are the fresh images. With --records, the p-values of
previews that `copy_onset.py` recorded are computed anew from their scores, after a change of the scale.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from concepts import ALL_CONCEPTS, NUM_FEW, NUM_TRAINING, NUM_VALIDATION, Concept
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter, ImageOps
from results import Cell, read
from timesteps_report import between
from torch import Tensor

from sdlora.common.bundled import pocket_folder
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.scale import (
    MAX_DECODED,
    NEW_SHARE,
    OWN_SHARE,
    SAME_PICTURE,
    Scale,
    evenly_spaced,
    measures,
)
from sdlora.copycheck.verdict import ALPHA, FULL, Match, judge

CELLS = ((4, 0), (8, 0), (12, 0), (24, 0), (4, 8), (12, 8), (24, 8))
EPOCHS, PREVIEWS, CAPTIONS, RUNS = 4, 6, 3, 1000
NOISE = 0.15  # of the latents' standard deviation
ALL = Embedders()


@dataclass(frozen=True)
class Compared:
    """Measures of one concept's images with its training images, (N, 24, M).

    Attributes:
        among: The training images with each other.
        validation: Validation images.
        own: Two further renders of every training caption, one after the other.
        new: Renders of captions that are in no set.
        copy: The training images as they are drawn, (24, M), each with itself.
    """

    among: Tensor
    validation: Tensor
    own: Tensor
    new: Tensor
    copy: Tensor

    def scale(self, count: int, held: int) -> Scale:
        """The scale of the first training and validation images."""
        among = self.among[:count, :count].clone()
        among[torch.eye(count, dtype=torch.bool)] = -torch.inf
        parts = [among.amax(dim=1), self.validation[:held, :count].amax(dim=1)]
        return Scale(torch.cat(parts), self.copy[:count].mean(dim=0), torch.empty(0))


def compare(concept: Concept, vae: AutoencoderKL | None, num_new: int = 60) -> Compared:
    """Render a concept's images and measure them; through the VAE if there is one."""

    def drawn(images: list[Image.Image], noise: float) -> list[Image.Image]:
        return images if vae is None else through(vae, images, noise)

    def measured(images: list[Image.Image]) -> Tensor:
        return measures(ALL.scores(images, training))

    training = [concept.draw(index, 0)[0] for index in range(NUM_TRAINING)]
    first = NUM_TRAINING + NUM_VALIDATION
    own = [concept.draw(index, take)[0] for take in (1, 2) for index in range(NUM_TRAINING)]
    copies = measured(drawn(training, 0.0))
    return Compared(
        among=measured(training),
        validation=measured([concept.draw(index, 0)[0] for index in range(NUM_TRAINING, first)]),
        own=measured(drawn(own, NOISE)),
        new=measured(drawn([concept.draw(index, 0)[0] for index in range(first, first + num_new)], NOISE)),
        copy=copies.diagonal(dim1=0, dim2=1).T,
    )


@torch.no_grad()
def through(vae: AutoencoderKL, images: Sequence[Image.Image], noise: float) -> list[Image.Image]:
    """Images encoded and decoded, with noise on their latents in units of those's standard deviation."""
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    latents = latents + noise * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    decoded = vae.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1)
    return [Image.fromarray(image) for image in ((decoded + 1) * 127.5).round().to(torch.uint8).numpy()]


class Rates(NamedTuple):
    """Shares of fresh previews that are significant, of epochs called "watch", and of runs called "copying"."""

    previews: float
    watch: float
    copying: float


def rates(compared: Compared, count: int, held: int, seed: int = 0) -> Rates:
    """What becomes of runs whose previews are fresh images; more are drawn where the product would draw more."""
    scale, draws = compared.scale(count, held), np.random.default_rng(seed)

    def significant(found: Tensor, share: float) -> np.ndarray:
        highest = scale.z_scores(found[:, :count], torch.full((len(found),), share)).amax(dim=1)
        return np.asarray((2 * torch.special.ndtr(-highest)).numpy() <= ALPHA)

    own = significant(compared.own, OWN_SHARE).reshape(2, -1)[:, :count]
    new = significant(compared.new, NEW_SHARE)
    verdict = {k: judge(_matches(k, PREVIEWS), []).verdict for k in range(PREVIEWS + 1)}
    later = {k: judge(_matches(k, FULL), []).verdict for k in range(FULL + 1)}
    watched = copied = 0
    for _ in range(RUNS):
        captions, called = draws.choice(count, CAPTIONS, replace=False), False
        for _ in range(EPOCHS):
            found = _count(draws, own[:, captions], new, PREVIEWS)
            told = verdict[found]
            if told == "watch":
                told = later[found + _count(draws, own[:, captions], new, FULL - PREVIEWS)]
            watched, called = watched + (told == "watch"), called or told == "copying"
        copied += called
    return Rates(float(np.concatenate([own.flatten(), new]).mean()), watched / RUNS / EPOCHS, copied / RUNS)


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
            among = measures(ALL.scores(images, images))
            among[torch.eye(len(images), dtype=torch.bool)] = -torch.inf
            twins = (among[..., 1] >= np.arctanh(0.8)).any(dim=1)
            found = measures(ALL.scores(squares, images))
            for index in range(len(images)):
                kept = [other for other in range(len(images)) if other != index and not twins[other]]
                if len(kept) < 2:
                    continue
                scale = Scale(among[kept][:, kept].amax(dim=1), measures(torch.ones(2)), torch.empty(0))
                share = torch.tensor([NEW_SHARE])
                copied = [*kept, index]
                hit = float(scale.z_scores(found[[index]][:, copied], share).amax())
                alarm = float(scale.z_scores(found[[index]][:, kept], share).amax())
                hits, copies = hits + (2 * float(torch.special.ndtr(torch.tensor(-hit))) <= ALPHA), copies + 1
                if not twins[index]:
                    alarms += 2 * float(torch.special.ndtr(torch.tensor(-alarm))) <= ALPHA
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


# --- Recorded previews ---------------------------------------------------------------------------------------------


def rejudge(row: Cell, vae: AutoencoderKL) -> Cell:
    """A row of `copy_onset.py` whose previews have the p-values of the present scale."""
    concept, few = ALL_CONCEPTS[row["cell"]["concept"]], row["cell"]["part"] != "many"
    held = [concept.draw(index, 0)[0] for index in range(NUM_TRAINING, NUM_TRAINING + NUM_VALIDATION)]
    trained = [concept.draw(index, 0)[0] for index in range(NUM_FEW if few else NUM_TRAINING)]
    scale = scale_of(trained, held, vae)
    for epoch in row.get("epochs", ()):
        _rejudge(epoch["check"], scale)
    if "heldout_check" in row:
        _rejudge(row["heldout_check"], scale_of(held, [], vae))
    if "own_previews_check" in row:
        scenes = [concept.draw(index, 0)[0] for index in concept.other_scenes()]
        _rejudge(row["own_previews_check"], scale_of(scenes, [], vae))
    return row


def scale_of(images: list[Image.Image], held: list[Image.Image], vae: AutoencoderKL) -> Scale:
    """The scale of a set, as `sdlora.copycheck.scale.set_scale` computes it from files."""
    scores = ALL.scores(images, images)
    among = measures(scores)
    among[(scores[..., 0] >= SAME_PICTURE) | torch.eye(len(images), dtype=torch.bool)] = -torch.inf
    parts = [among.amax(dim=1)]
    if held:
        parts.append(measures(ALL.scores(held, images)).amax(dim=1))
    chosen = [images[index] for index in evenly_spaced(len(images), MAX_DECODED)]
    copies = measures(ALL.scores(through(vae, chosen, 0.0), chosen)).diagonal(dim1=0, dim2=1).T
    found = torch.cat(parts)
    return Scale(found[torch.isfinite(found).all(dim=1)], copies.mean(dim=0), torch.empty(0))


def _rejudge(check: dict[str, Any], scale: Scale) -> None:
    for preview in check["previews"]:
        kind, detail, layout, _ = preview
        share = torch.tensor([OWN_SHARE if kind == "training" else NEW_SHARE])
        z = scale.z_scores(measures(torch.tensor([[[detail, layout]]])), share)
        preview[3] = round(min(1.0, 2 * float(torch.special.ndtr(-z))), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="the folder of the page to fill")
    parser.add_argument("--photos", type=Path, nargs="+", help="folders of photographs, one for each subject")
    parser.add_argument("--json", action="store_true", help="print the rates of every concept")
    parser.add_argument("--records", type=Path, help="results of copy_onset.py to be judged anew")
    arguments = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(pocket_folder() / "vae")
    if arguments.records:
        rows = [rejudge(row, vae) if row["cell"]["part"] != "oracle" else row for row in read(arguments.records)]
        arguments.records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    name, lines = "photographs", []
    if arguments.photos:
        lines = photographs(arguments.photos)
    else:
        name, found = "fresh", {}
        for kind, drawer in (("crisp", None), ("through the VAE", vae)):
            found[kind] = []
            for concept in ALL_CONCEPTS.values():
                compared = compare(concept, drawer)
                found[kind].append({cell: rates(compared, *cell) for cell in CELLS})
                if arguments.json:
                    print(json.dumps([concept.name, kind, {str(cell): r for cell, r in found[kind][-1].items()}]))
        lines = table(found)
    print("\n".join(lines))
    if arguments.docs:
        page = arguments.docs / "copy-check.md"
        page.write_text(between(page.read_text(encoding="utf-8"), name, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
