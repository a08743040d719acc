"""Densities against their formulas, by integration in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from sdlora.data.batches import epoch_batches
from sdlora.diffusion.timesteps import Density, Draw, Exposure, band_names, band_of, cover
from sdlora.errors import ConfigError


def logit_normal(x: torch.Tensor, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Esser et al. 2403.03206, equation 19."""
    logit = torch.log(x / (1 - x))
    return torch.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * x * (1 - x))


DENSITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": torch.ones_like,
    "logit_normal": logit_normal,
    # The density of u^3 is that of u over the slope of the cube.
    "cubic_low": lambda x: x ** (-2 / 3) / 3,
    "cubic_high": lambda x: (1 - x) ** (-2 / 3) / 3,
    # Wang et al. 2405.17403: k / (T + tau (k - 1)) below tau, 1 / (T + tau (k - 1)) above, per timestep.
    "speed": lambda x: torch.where(x < 0.7, 5.0, 1.0).double() * 1000 / (1000 + 700 * 4),
}


def probabilities(density: Density) -> list[float]:
    return [high - low for low, high in pairwise(density.edges)]


def integrated(density: Callable[[torch.Tensor], torch.Tensor], points: int = 400) -> torch.Tensor:
    """The density's integral over each of the 1000 timesteps, by midpoints."""
    x = (torch.arange(1000 * points, dtype=torch.float64) + 0.5) / (1000 * points)
    return density(x).view(1000, points).mean(dim=1) / 1000


@pytest.mark.parametrize("name", list(DENSITIES))
def test_probabilities_equal_the_formulas(name: str) -> None:
    found = torch.tensor(probabilities(Density(name)), dtype=torch.float64)
    assert found.sum().item() == pytest.approx(1)
    expected = integrated(DENSITIES[name])
    inner = slice(5, 995)  # the cubic densities are infinite at an edge, where midpoints miss a part
    torch.testing.assert_close(found[inner], expected[inner], rtol=2e-3, atol=1e-9)


def test_logit_normal_follows_mean_and_std() -> None:
    found = torch.tensor(probabilities(Density("logit_normal", mean=0.7, std=0.5)), dtype=torch.float64)
    expected = integrated(lambda x: logit_normal(x, 0.7, 0.5))
    torch.testing.assert_close(found[5:995], expected[5:995], rtol=1e-4, atol=1e-12)


def test_limits_truncate_and_rescale() -> None:
    whole, cut = probabilities(Density("cubic_low")), probabilities(Density("cubic_low", minimum=100, maximum=299))
    inside = sum(whole[100:300])
    assert cut[100:300] == pytest.approx([p / inside for p in whole[100:300]])
    assert sum(cut[:100]) == sum(cut[300:]) == 0


def test_a_shift_may_depend_on_the_size() -> None:
    options: dict[str, Any] = {"std": 0.8, "minimum": 100, "high_noise_keep": 0.5}
    density = Density("logit_normal", log_shift=0.6, shift_at=lambda size: size[0] * size[1] / 100, **options)
    assert density.at((6, 10)) is density
    assert density.at((10, 12)).edges == Density("logit_normal", log_shift=1.2, **options).edges
    assert density.at((10, 12)) is density.at((12, 10))
    plain = Density("uniform")
    assert plain.at((6, 10)) is plain


def test_high_noise_keep_lowers_high_noise() -> None:
    found = probabilities(Density("uniform", high_noise_keep=0.25))
    assert found[800] / found[799] == pytest.approx(0.25)
    assert sum(found[800:]) == pytest.approx(0.05 / 0.85)


@pytest.mark.parametrize("name", list(DENSITIES))
def test_draws_follow_the_probabilities(name: str) -> None:
    density, count = Density(name, high_noise_keep=0.5), 200_000
    expected = torch.tensor(probabilities(density)).view(20, 50).sum(dim=1)
    drawn = torch.tensor([density.timestep(Draw(i, count, 0.5)) for i in range(count)])
    counts = torch.bincount(drawn // 50, minlength=20) / count
    assert (counts - expected).abs().max() < 2e-4


@pytest.mark.parametrize("num_slices", range(1, 51))
@pytest.mark.parametrize("offset", [0.0, 0.3, 1 - 2**-53])
def test_slices_have_different_timesteps(num_slices: int, offset: float) -> None:
    density = Density("uniform")
    drawn = [density.timestep(Draw(i, num_slices, offset)) for i in range(num_slices)]
    assert [t * num_slices // 1000 for t in drawn] == list(range(num_slices))


def test_draws_reach_the_limits_and_stay_inside() -> None:
    density = Density("uniform", minimum=10, maximum=13)
    assert [density.timestep(Draw(0, 1, offset)) for offset in (0.0, 0.26, 1 - 2**-53)] == [10, 11, 13]
    assert Density("speed", minimum=7, maximum=7).timestep(Draw(3, 5, 0.9)) == 7
    assert Density("uniform").timestep(Draw(0, 1, 1 - 2**-53)) == 999


def test_empty_and_unknown_densities_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"timesteps\.min.*900.*timesteps\.max.*999"):
        Density("logit_normal", mean=-10.0, std=0.01, minimum=900)
    with pytest.raises(KeyError):
        Density("unifrom")


def test_five_bands_of_200_timesteps() -> None:
    assert [band_of(timestep) for timestep in (0, 199, 200, 399, 400, 600, 799, 800, 999)] == [
        0, 0, 1, 1, 2, 3, 3, 4, 4,
    ]  # fmt: skip
    assert band_names() == ["0-199", "200-399", "400-599", "600-799", "800-999"]


def plan(num_images: int, repeats: int, epochs: int, batch_size: int, buckets: int = 1) -> list[list[Exposure]]:
    """The steps of a real run."""
    shapes = [[index % buckets] for index in range(num_images)]
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
