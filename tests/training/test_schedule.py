"""The plan of exposures: counts, noise levels and the interleaving of preserved images."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Dataset, Example
from sdlora.training.schedule import one_in, plan_prior, plan_training


def dataset(repeats: list[int], name: str = "p") -> Dataset:
    """Images in two sizes by turns."""
    return Dataset(
        Path("set"),
        tuple(
            Example(f"{name}{index}", Path("x"), "x", (32, 32) if index % 2 else (40, 24), (64, 64), repeats=times)
            for index, times in enumerate(repeats)
        ),
        (),
    )


def config(**train: object) -> RunConfig:
    return parse_config({"data": {"folder": "x"}, "train": {"epochs": 3, "batch_size": 2, **train}}, name="n")


def test_every_image_is_exposed_as_often_as_its_own_repeats() -> None:
    repeats = [1, 5, 2, 3, 5, 1]
    plan = plan_training(config(gradient_accumulation_steps=2), dataset(repeats))
    for number, epoch in enumerate(plan.epochs, start=1):
        met: dict[int, list[int]] = defaultdict(list)
        for step in epoch:
            assert 1 <= len(step) <= 2
            for exposure in (exposure for batch in step for exposure in batch):
                met[exposure.example].append(exposure.exposure)
        for index, times in enumerate(repeats):
            assert sorted(met[index]) == list(range((number - 1) * times + 1, number * times + 1))
    assert len(plan.timesteps) == 3 * sum(repeats)


def test_each_images_exposures_are_spread_over_the_noise_levels() -> None:
    plan = plan_training(config(), dataset([1, 5, 2, 4]))
    for index, times in enumerate([1, 5, 2, 4]):
        found = sorted(t for exposure, t in plan.timesteps.items() if exposure.example == index)
        width = 1000 / (3 * times)
        assert [int(timestep // width) for timestep in found] == list(range(3 * times))


@pytest.mark.parametrize(("every", "size"), [(1, 4), (2, 4), (2, 1), (3, 4), (4, 4), (5, 3)])
def test_one_in_so_many_exposures_is_as_likely_as_another_and_spread_over_the_noise(every: int, size: int) -> None:
    batches = [tuple(Exposure(place, number) for place in range(size)) for number in range(3000)]
    # The noise level's place in a batch is another one each time.
    timesteps = {v: 200 * ((v.example + v.exposure) % size) + v.exposure % 200 for batch in batches for v in batch}
    kept = one_in(every, batches, timesteps, 0)
    for place in range(size):
        share = sum(Exposure(place, number) in kept for number in range(3000)) / 3000
        assert share == pytest.approx(1 / every, abs=0.04)
    for batch in batches:
        ranks = [rank for rank, v in enumerate(sorted(batch, key=lambda v: timesteps[v])) if v in kept]
        assert len(ranks) in (size // every, -(-size // every))
        assert all(after - before == every for before, after in pairwise(ranks))
    assert kept == one_in(every, batches, timesteps, 0)
    assert (kept == one_in(every, batches, timesteps, 1)) == (every == 1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_prior_images_come_in_rounds_beside_every_batch(accumulation: int) -> None:
    settings = config(gradient_accumulation_steps=accumulation)
    trained = plan_training(settings, dataset([3, 4, 3, 4, 3]))
    kept = dataset([1] * 5, "kept")
    plan = plan_prior(settings, kept, trained)
    assert [[len(step) for step in epoch] for epoch in plan.epochs] == [
        [len(step) for step in epoch] for epoch in trained.epochs
    ]
    exposures = [exposure for epoch in plan.epochs for step in epoch for batch in step for exposure in batch]
    counts = Counter(exposure.example for exposure in exposures)
    assert set(counts) == set(range(5))
    # Round by round: nobody is met again before everyone was.
    assert max(counts.values()) - min(counts.values()) <= 1
    for place, exposure in enumerate(exposures):
        assert exposure.exposure == Counter(v.example for v in exposures[: place + 1])[exposure.example]
    for epoch in plan.epochs:
        for batch in (batch for step in epoch for batch in step):
            assert len({kept.examples[exposure.example].bucket for exposure in batch}) == 1
    # Each image's exposures fall into as many slices of the noise levels, one into each.
    for index, count in counts.items():
        found = sorted(plan.timesteps[exposure] for exposure in exposures if exposure.example == index)
        assert [int(timestep // (1000 / count)) for timestep in found] == list(range(count))
    assert plan == plan_prior(settings, kept, trained)
    other = settings.model_copy(update={"seed": 1})
    assert plan.epochs != plan_prior(other, kept, trained).epochs


def test_prior_images_do_not_move_what_is_trained() -> None:
    settings = config()
    trained = plan_training(settings, dataset([2, 2, 2]))
    plan_prior(settings, dataset([1] * 3), trained)
    assert trained == plan_training(settings, dataset([2, 2, 2]))
