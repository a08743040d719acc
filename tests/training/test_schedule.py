"""The exposure schedule: counts and timesteps."""

from __future__ import annotations

from collections import defaultdict

from helpers.schedules import dataset, schedule_settings

from sdlora.training.schedule import make_schedule


def test_every_image_is_exposed_as_often_as_its_repeats() -> None:
    repeats = [1, 5, 2, 3, 5, 1]
    schedule = make_schedule(schedule_settings(gradient_accumulation_steps=2), dataset(repeats))
    for number, epoch in enumerate(schedule.epochs, start=1):
        met: dict[int, list[int]] = defaultdict(list)
        for step in epoch:
            assert 1 <= len(step) <= 2
            for exposure in (exposure for batch in step for exposure in batch):
                met[exposure.example].append(exposure.number)
        for index, times in enumerate(repeats):
            assert sorted(met[index]) == list(range((number - 1) * times + 1, number * times + 1))
    assert len(schedule.timesteps) == 3 * sum(repeats)


def test_exposures_of_an_image_are_spread_over_the_timesteps() -> None:
    schedule = make_schedule(schedule_settings(), dataset([1, 5, 2, 4]))
    for index, times in enumerate([1, 5, 2, 4]):
        found = sorted(t for exposure, t in schedule.timesteps.items() if exposure.example == index)
        width = 1000 / (3 * times)
        assert [int(timestep // width) for timestep in found] == list(range(3 * times))
