"""The oracle of copies: a small network that tells an image of the very same scene from a fresh render of its caption.

It knows the world and nothing of the copy check: trained contrastively on scenes of the world and on creatures that
are in no concept, it brings a render and its spoiled version together (blurred, smudged, shifted, toned, noised) and
keeps apart what differs only in details that no caption tells. A copy is an image that is nearer to a training
image than all but one in a hundred fresh renders of the same captions are.

    python tests/benchmarks/copy_oracle.py oracle.pt    trains one (about four minutes on one core) and examines it
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from concepts import ALL_CONCEPTS, Concept, make_creature, render_creature
from diffusers import StableDiffusionImg2ImgPipeline
from generate import draw, load_pipeline
from PIL import Image, ImageDraw
from setting import silence
from torch import Tensor, nn

from sdlora.common.bundled import pocket_folder
from sdlora.common.seeds import derive, generator
from sdlora.pocket import pen, sets, stages, world

NUM_STEPS = 600
NUM_CAPTIONS, NUM_TAKES = 12, 4  # of a batch; the takes of a caption are one another's hard negatives
TEMPERATURE = 0.1
FALSE_ALARMS = 0.01  # by construction, see Witness
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # 0.3 and below leaves a copy, 0.7 and above none
# Far from the scenes of the base's training and of the judge's; creatures from this seed on are in no concept.
SCENE_SEEDS, CREATURE_SEEDS = 70_000_000, 1000


class Oracle(nn.Module):
    """Four halving convolutions and one linear layer over all places, to a direction in 128 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise([3, 32, 64, 96, 128]):
            blocks += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 128))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.body(pixels), dim=1)


# --- Training ------------------------------------------------------------------------------------------------------


def takes(seed: int, count: int = NUM_TAKES) -> list[Image.Image]:
    """Fresh renders of one caption, as a function of a number."""
    rng = random.Random(derive(0, "oracle caption", seed))
    scene = world.random_scene(derive(0, "oracle scene", seed))
    scenes = [replace(scene, seed=derive(0, "oracle take", seed, take)) for take in range(count)]
    pose, creature = rng.choice(sets.POSES), make_creature(CREATURE_SEEDS + rng.randrange(100_000))
    red, green, blue, tone = (rng.randrange(256) for _ in range(4))
    draw = rng.random()
    if draw < 0.4:
        return [world.render(s) for s in scenes]
    if draw < 0.8:
        return [render_creature(s, pose, creature) for s in scenes]
    return [_on_squared_paper(s, (red, green, blue), (tone, red, green)) for s in scenes]


def _on_squared_paper(scene: world.Scene, paper: pen.Color, lines: pen.Color) -> Image.Image:
    """A subject of the world on paper of any two colours, so that a blueprint's squares are no surprise."""
    rng = random.Random(derive(0, "render", scene.seed))
    canvas = pen.new_canvas(paper)
    board = ImageDraw.Draw(canvas)
    start = rng.randrange(8) * pen.OVERSAMPLING
    for at in range(start, pen.CANVAS_PX, 8 * pen.OVERSAMPLING):
        board.rectangle([at, 0, at + pen.OVERSAMPLING - 1, pen.CANVAS_PX], fill=lines)
        board.rectangle([0, at, pen.CANVAS_PX, at + pen.OVERSAMPLING - 1], fill=lines)
    world.draw_kind(world.subject_pen(canvas, scene, rng), scene.kind)
    return pen.shrink(canvas)


def spoil(pixels: Tensor, seed: int) -> Tensor:
    """As a diffusion model gives an image back: soft, smudged, a little displaced, toned and noisy; (B, 3, 64, 64)."""
    draw = generator(0, "oracle spoil", seed)
    size = len(pixels)

    def amount(most: float) -> Tensor:
        return most * torch.rand(size, 1, 1, 1, generator=draw)

    def smooth(cells: int, deviation: float) -> Tensor:
        noise = deviation * torch.randn(size, 3, cells, cells, generator=draw)
        return F.interpolate(noise, size=(64, 64), mode="bilinear", align_corners=False)

    soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
    very_soft = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear", align_corners=False)
    mixed = pixels + amount(1.0) * (soft - pixels)
    # Some places are softer than others, and some are wrong altogether.
    where = torch.sigmoid(8 * (smooth(6, 1.0)[:, :1] - 0.8))
    mixed = mixed + where * (very_soft - mixed)
    wrong = torch.sigmoid(8 * (smooth(6, 1.0)[:, :1] - 1.3)) * (torch.rand(size, 1, 1, 1, generator=draw) < 0.5)
    mixed = mixed + wrong * (mixed.roll(1, 0) - mixed)
    mixed = mixed + amount(0.25) * smooth(16, 1.0) + amount(0.2) * smooth(4, 1.0)
    corner = torch.eye(2, 3).repeat(size, 1, 1)
    corner[:, :, 2] = (torch.rand(size, 2, generator=draw) - 0.5) * (4 / 64)  # up to one pixel
    grid = F.affine_grid(corner, [size, 3, 64, 64], align_corners=False)
    mixed = F.grid_sample(mixed, grid, padding_mode="border", align_corners=False)
    gain = 1 + 0.1 * torch.randn(size, 3, 1, 1, generator=draw)
    shift = 0.05 * torch.randn(size, 3, 1, 1, generator=draw)
    return (mixed * gain + shift + amount(0.12) * torch.randn(pixels.shape, generator=draw)).clamp(-1, 1)


def train_oracle(num_steps: int = NUM_STEPS) -> Oracle:
    """Train from nothing; the same weights every time on one machine.

    Source: van den Oord et al. 1807.03748, equation 4 (InfoNCE), both ways as in Radford et al. 2103.00020.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        oracle = Oracle()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
    for step in range(num_steps):
        seeds = range(SCENE_SEEDS + step * NUM_CAPTIONS, SCENE_SEEDS + (step + 1) * NUM_CAPTIONS)
        pixels = stages.to_tensor([image for seed in seeds for image in takes(seed)])
        known, spoiled = oracle(torch.cat([pixels, spoil(pixels, step)])).chunk(2)
        similarity = spoiled @ known.T / TEMPERATURE
        same = torch.arange(len(pixels))
        loss = F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return oracle.eval()


def load_or_train(path: Path | None) -> Oracle:
    """Read the oracle from a file, or train it and keep it there."""
    if path is not None and path.exists():
        oracle = Oracle()
        oracle.load_state_dict(torch.load(path, weights_only=True))
        return oracle.eval()
    oracle = train_oracle()
    if path is not None:
        torch.save(oracle.state_dict(), path)
    return oracle


# --- Asking it -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(oracle: Oracle, images: Sequence[Image.Image]) -> Tensor:
    """The directions of P images of any size, (P, 128), a few hundred at a time."""
    small = [image.resize((pen.SIZE_PX, pen.SIZE_PX)) for image in images]
    return torch.cat([oracle(stages.to_tensor(small[i : i + 200])) for i in range(0, len(small), 200)])


class Witness:
    """Says which images are copies of some of a concept's images.

    An image that knows nothing of them beyond their captions is as likely to be nearest to one set of renders of
    these captions as to another; so with 99 sets of fresh renders beside the real one it is called a copy one time in
    a hundred, however good or bad the image is.

    Args:
        oracle: Whose eyes it has.
        concept: Whose images.
        indices: Which of them may have been copied.
    """

    def __init__(self, oracle: Oracle, concept: Concept, indices: Sequence[int]) -> None:
        self._oracle = oracle
        num_sets = round(1 / FALSE_ALARMS)
        renders = [concept.draw(index, take)[0] for take in range(num_sets) for index in indices]
        self._known = look(oracle, renders)
        self._num_sets = num_sets

    def best(self, images: Sequence[Image.Image]) -> Tensor:
        """The highest similarity of every image, mirrored or not, to each set, (P, sets); the first is the real one."""
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        found = torch.maximum(*(look(self._oracle, seen) @ self._known.T for seen in (images, mirrored)))
        return found.view(len(images), self._num_sets, -1).amax(dim=2)

    def copies(self, images: Sequence[Image.Image]) -> list[bool]:
        """Which images are nearer to the real set than to any other."""
        best = self.best(images)
        return (best[:, 0] > best[:, 1:].amax(dim=1)).tolist()


# --- Examining it --------------------------------------------------------------------------------------------------


def soften(pipeline: Any, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
    """Images through the base's autoencoder, its latents a little noisy, and spoiled besides."""
    with torch.no_grad():
        latents = pipeline.vae.encode(stages.to_tensor(list(images))).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator(0, "oracle latents", seed))
        pixels = pipeline.vae.decode(latents + 0.15 * float(latents.std()) * noise).sample
    return to_images(spoil(pixels, derive(0, "oracle examination", seed)))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to images."""
    data = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(image.numpy()) for image in data]


def redrawn(pipeline: Any, images: Sequence[Image.Image], captions: Sequence[str], strength: float) -> list[Any]:
    """What the base makes of images when it starts from them, `strength` of the way to noise."""
    generators = [torch.Generator().manual_seed(500 + i) for i in range(len(images))]
    made = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    answer = made(list(captions), image=list(images), strength=strength, num_inference_steps=25, guidance_scale=2.0,
                  generator=generators)  # fmt: skip
    return list(answer.images)


def examine(oracle: Oracle, pipeline: Any, concept: Concept, count: int = 24) -> dict[str, tuple[int, int]]:
    """How many of how many images are called copies, by what they are.

    Args:
        oracle: The trained oracle.
        pipeline: The base, from `generate.load_pipeline`.
        concept: One that the oracle has not been trained on.
        count: Images of each kind, from as many captions of the set as there are, but at most 24.
    """
    indices = range(min(count, 24))
    witness = Witness(oracle, concept, indices)
    same = [concept.draw(i, 0) for i in indices]
    fresh = [concept.draw(i, 1000)[0] for i in indices]
    images, captions = [image for image, _ in same], [caption for _, caption in same]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    sets_of = {
        "same, spoiled": soften(pipeline, images, 0),
        "same, mirrored and spoiled": soften(pipeline, mirrored, 1),
        "fresh": fresh,
        "fresh, spoiled": soften(pipeline, fresh, 2),
        **{f"same, redrawn at {s:g}": redrawn(pipeline, images, captions, s) for s in STRENGTHS},
        "fresh, redrawn at 0.3": redrawn(pipeline, fresh, captions, 0.3),
        "the base's": draw(pipeline, captions, guidance=2.0),
    }
    return {name: (sum(witness.copies(drawn)), len(drawn)) for name, drawn in sets_of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the oracle is kept")
    parser.add_argument("--base", type=Path, default=pocket_folder())
    arguments = parser.parse_args()
    silence()
    oracle, pipeline = load_or_train(arguments.path), load_pipeline(arguments.base)
    for concept in ALL_CONCEPTS.values():
        print(json.dumps({"concept": concept.name, "copies": examine(oracle, pipeline, concept)}), flush=True)


if __name__ == "__main__":
    main()
