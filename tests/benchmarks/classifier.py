"""The judge of generated images: a small network trained on renders alone, and never shipped.

It names an image's kind (the world's sixteen, one of the benchmarks' concepts, or nothing it knows), its colour
and its place. Training images are blurred, shifted and noised, so that a soft edge is no reason to refuse one, and
spoiled ones (empty places, mixtures, torn and melted subjects) are "nothing", so that rubbish is not accepted.

    python tests/benchmarks/classifier.py judge.pt     trains one (about three minutes on one core) and tests it
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from concepts import ALL_CONCEPTS, CONCEPTS, CREATURES, render_creature
from PIL import Image
from torch import Tensor, nn

from sdlora.common.seeds import derive, generator
from sdlora.pocket import sets, stages, world
from sdlora.pocket.pen import SIZE_PX

NOTHING = "nothing"
KINDS = [*world.KINDS, *CONCEPTS, NOTHING]
ALL_KINDS = [*world.KINDS, *ALL_CONCEPTS, NOTHING]
COLORS = list(world.COLORS)
PLACES = list(world.PLACES)
NUM_STEPS, BATCH = 1400, 64
# Renders for training and for testing the judge come from seeds that the base's training never reaches.
TRAIN_SEEDS, TEST_SEEDS = 50_000_000, 60_000_000
IGNORED = -100


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in an image."""

    kind: str
    color: str
    place: str


class Judge(nn.Module):
    """Five convolutions, a mean over the image, three linear heads.

    Args:
        kinds: What it can name: KINDS or ALL_KINDS.
    """

    def __init__(self, kinds: list[str] = KINDS) -> None:
        super().__init__()
        self.kinds = kinds
        widths = [3, 24, 48, 96, 128]
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            blocks += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*blocks, nn.Conv2d(128, 128, 3, 1, 1), nn.GroupNorm(8, 128), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(256, len(names)) for names in (kinds, COLORS, PLACES))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        features = self.body(pixels)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return [head(pooled) for head in self.heads]


def _concept(name: str, seed: int) -> tuple[Image.Image, int]:
    """A concept in any place, size, position and pose, not only in those of its set; the place's label."""
    rng = random.Random(derive(0, "judge concept", seed))
    place = rng.choice(PLACES)
    kind = rng.choice(list(world.KINDS))
    scene = world.Scene(
        kind, "white", "plain", rng.choice(list(world.SIZES)), rng.choice(list(world.POSITIONS)), place, seed
    )
    pose = rng.choice(sets.POSES)
    if name == "blueprint":
        return sets.render_style(scene), IGNORED
    if name in CREATURES:
        return render_creature(scene, pose, CREATURES[name]), PLACES.index(place)
    return sets.render_character(scene, pose), PLACES.index(place)


def _spoiled(seed: int, concepts: list[str]) -> Image.Image:
    """Something that must not pass for a subject."""
    rng = random.Random(derive(0, "judge spoiled", seed))
    kind = rng.randrange(4)
    if kind == 0:
        return world.shrink(world.PLACES[rng.choice(PLACES)][1](rng))
    concept = _concept(rng.choice(concepts), seed)[0]
    if kind == 1:
        # Two subjects at once, each half there.
        return Image.blend(world.render(world.random_scene(seed)), concept, rng.uniform(0.4, 0.6))
    image = concept if rng.random() < 0.5 else world.render(world.random_scene(seed))
    if kind == 2:
        # Torn: all tiles of eight pixels where subjects are have changed places.
        tiles = [(x, y) for x in range(8, 56, 8) for y in range(16, 64, 8)]
        pieces = [image.crop((x, y, x + 8, y + 8)) for x, y in tiles]
        rng.shuffle(pieces)
        for (x, y), piece in zip(tiles, pieces, strict=True):
            image.paste(piece, (x, y))
        return image
    # Melted: shrunk to a few pixels and blown up again.
    return image.resize((6, 6), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)


def sample(seed: int, kinds: list[str] = KINDS) -> tuple[Image.Image, tuple[int, int, int]]:
    """An image and its labels (kind, colour, place); what has none is ignored by the loss."""
    concepts = [name for name in ALL_CONCEPTS if name in kinds]
    draw = derive(0, "judge sample", seed) % 100
    if draw < 28:
        name = concepts[draw % len(concepts)]
        image, place = _concept(name, seed)
        return image, (kinds.index(name), IGNORED, place)
    if draw < 42:
        return _spoiled(seed, concepts), (kinds.index(NOTHING), IGNORED, IGNORED)
    scene = world.random_scene(seed)
    labels = (kinds.index(scene.kind), COLORS.index(scene.color), PLACES.index(scene.place))
    return world.render(scene), labels


def _soften(pixels: Tensor, step: int) -> Tensor:
    """Blur, noise, shift and change of brightness, by one amount per batch."""
    draw = generator(0, "judge soften", step)
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
    amount = torch.rand(len(pixels), 1, 1, 1, generator=draw) * 0.8
    mixed = pixels + amount * (blurred - pixels)
    shift = torch.randint(-3, 4, (2,), generator=draw).tolist()
    mixed = torch.roll(mixed, shifts=shift, dims=(2, 3))
    gain = 1 + 0.12 * torch.randn(len(pixels), 3, 1, 1, generator=draw).clamp(-1.5, 1.5)
    return mixed * gain + 0.06 * torch.randn(pixels.shape, generator=draw)


def train_judge(kinds: list[str] = KINDS) -> Judge:
    """Train from nothing; the same weights every time on one machine."""
    torch.manual_seed(0)
    judge = Judge(kinds)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=NUM_STEPS)
    for step in range(NUM_STEPS):
        drawn = [sample(TRAIN_SEEDS + step * BATCH + i, kinds) for i in range(BATCH)]
        pixels = _soften(stages.to_tensor([image for image, _ in drawn]), step)
        labels = torch.tensor([label for _, label in drawn])
        answers = judge(pixels)
        loss = sum(F.cross_entropy(answer, labels[:, i], ignore_index=IGNORED) for i, answer in enumerate(answers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def load_or_train(path: Path | None, kinds: list[str] = KINDS) -> Judge:
    """Read the judge from a file, or train it and keep it there."""
    if path is not None and path.exists():
        judge = Judge(kinds)
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    judge = train_judge(kinds)
    if path is not None:
        torch.save(judge.state_dict(), path)
    return judge


@torch.no_grad()
def look(judge: Judge, images: list[Image.Image]) -> list[Verdict]:
    """What the judge sees in each image, which is made 64x64 first."""
    edges = (SIZE_PX, SIZE_PX)
    images = [image if image.size == edges else image.resize(edges, Image.Resampling.BOX) for image in images]
    names, colors, places = (answer.argmax(dim=1).tolist() for answer in judge(stages.to_tensor(images)))
    found = zip(names, colors, places, strict=True)
    return [Verdict(judge.kinds[kind], COLORS[color], PLACES[place]) for kind, color, place in found]


def examine(judge: Judge, count: int = 1500) -> dict[str, float]:
    """Shares of fresh renders judged rightly, and of spoiled ones taken for a subject."""
    concepts = [name for name in ALL_CONCEPTS if name in judge.kinds]
    right: dict[str, list[bool]] = {name: [] for name in ("kind", "color", "place", *concepts, NOTHING)}
    for first in range(TEST_SEEDS, TEST_SEEDS + count, 100):
        drawn = [sample(seed, judge.kinds) for seed in range(first, first + 100)]
        for (_, (kind, color, place)), seen in zip(drawn, look(judge, [p for p, _ in drawn]), strict=True):
            name = judge.kinds[kind]
            right[name if name in right else "kind"].append(seen.kind == name)
            if color != IGNORED:
                right["color"].append(seen.color == COLORS[color])
                right["place"].append(seen.place == PLACES[place])
    return {name: sum(values) / len(values) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="where the judge is kept")
    parser.add_argument("--all", action="store_true", help="one that knows the copy check's further concepts as well")
    arguments = parser.parse_args()
    print(json.dumps(examine(load_or_train(arguments.path, ALL_KINDS if arguments.all else KINDS))))


if __name__ == "__main__":
    main()
