"""Coverage: the timesteps that every image and every step gets."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sdlora.data.batches import epoch_batches
from sdlora.diffusion.stratify import Exposure, cover
from sdlora.diffusion.timesteps import Draw


def plan(num_images: int, repeats: int, epochs: int, batch_size: int, buckets: int = 1) -> list[list[Exposure]]:
    """The steps of a real run."""
    shapes = [index % buckets for index in range(num_images)]
    batches = [b for epoch in range(1, epochs + 1) for b in epoch_batches(shapes, repeats, batch_size, epoch, 0)]
    return [[(f"{exposure.example}.png", exposure.number) for exposure in batch] for batch in batches]


def places(draws: list[list[Draw]]) -> list[torch.Tensor]:
    """Every step's quantiles."""
    return [torch.tensor([(d.slice + d.offset) / d.num_slices for d in step], dtype=torch.float64) for step in draws]


@pytest.mark.parametrize("exposures", range(1, 51))
def test_each_image_is_drawn_once_in_each_slice(exposures: int) -> None:
    steps = plan(7, exposures, 1, 3, buckets=2)
    slices: dict[str, list[int]] = {}
    for step, drawn in zip(steps, cover("image", steps, 5), strict=True):
        for (name, _), draw in zip(step, drawn, strict=True):
            assert draw.num_slices == exposures
            slices.setdefault(name, []).append(draw.slice)
    assert all(sorted(found) == list(range(exposures)) for found in slices.values())
    assert len(slices) == 7


@pytest.mark.parametrize("coverage", ["none", "batch", "image"])
def test_draws_depend_on_seed_and_schedule_alone(coverage: str) -> None:
    steps = plan(6, 2, 2, 4)
    assert cover(coverage, steps, 1) == cover(coverage, steps, 1) != cover(coverage, steps, 2)


@pytest.mark.parametrize("coverage", ["none", "batch", "image"])
def test_draws_of_every_coverage_are_uniform(coverage: str) -> None:
    steps = plan(6, 2, 2, 4)
    drawn = torch.cat([torch.cat(places(cover(coverage, steps, seed))) for seed in range(400)])
    counts = torch.histc(drawn, bins=10, min=0, max=1)
    expected = len(drawn) / 10
    # A chi-square of 9 degrees of freedom is below 27.9 with probability .999.
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_single_exposure_is_uniform_under_image_coverage() -> None:
    steps = plan(5, 3, 1, 2)
    drawn = torch.stack([torch.cat(places(cover("image", steps, seed))) for seed in range(2000)])
    for exposure in range(drawn.shape[1]):
        counts = torch.histc(drawn[:, exposure], bins=10, min=0, max=1)
        # One in 50 exposures may exceed the .999 bound; this one is exceeded once in a million.
        assert ((counts - 200) ** 2 / 200).sum() < 45, exposure


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_batch_coverage_spreads_each_step_evenly(size: int) -> None:
    steps = plan(24, 5, 2, size)
    for found in places(cover("batch", steps, 0)):
        gaps = found.sort().values - torch.arange(size, dtype=torch.float64) / size
        assert gaps.max() - gaps.min() < 1e-9, "all are one grid, shifted"


def variance_of_step_means(coverage: str, size: int, exposures: int) -> float:
    """The variance over steps of the mean of a loss that falls from 1 to .002 over the timesteps."""
    steps = plan(24, exposures, 1, size)
    found = [(0.002**step).mean() for seed in range(40) for step in places(cover(coverage, steps, seed))]
    return torch.stack(found).var().item()


@pytest.mark.parametrize("exposures", [5, 40])
def test_image_coverage_lowers_the_variance_like_batch_coverage(exposures: int) -> None:
    for size in (4, 8):
        chance, batch, image = (variance_of_step_means(c, size, exposures) for c in ("none", "batch", "image"))
        assert chance / batch > 2
        # With few exposures a slice is wide, and being one slice off costs a part of the gain.
        assert chance / image > 2
        assert exposures < 40 or image < batch


def test_image_coverage_never_misses_high_noise() -> None:
    # Drawn by chance, an image misses the upper fifth with probability .33 at five exposures.
    steps = plan(50, 5, 1, 4)
    for coverage in ("none", "image"):
        seen: Counter[str] = Counter()
        for step, found in zip(steps, places(cover(coverage, steps, 0)), strict=True):
            for (name, _), place in zip(step, found.tolist(), strict=True):
                seen[name] += place >= 0.8
        missed = sum(count == 0 for count in seen.values())
        assert missed == 0 if coverage == "image" else 8 <= missed <= 26


def test_unknown_coverage_is_refused() -> None:
    with pytest.raises(KeyError):
        cover("images", plan(2, 1, 1, 1), 0)
