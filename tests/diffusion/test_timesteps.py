from collections import Counter

from sdlora.diffusion.timesteps import timestep


def draws(count: int, minimum: int = 0, maximum: int = 999, seed: int = 0) -> list[int]:
    return [timestep("uniform", minimum, maximum, seed=seed, example="a.png", visit=v) for v in range(1, count + 1)]


def test_a_draw_is_a_function_of_seed_example_and_visit() -> None:
    assert draws(50) == draws(50)
    assert draws(50) != draws(50, seed=1)
    assert timestep("uniform", 0, 999, seed=0, example="b.png", visit=1) != draws(1)[0]


def test_uniform_is_uniform() -> None:
    counts = Counter(t // 100 for t in draws(20_000))
    # A chi-square of 9 degrees of freedom is below 27.9 with probability .999.
    assert sum((counts[band] - 2000) ** 2 / 2000 for band in range(10)) < 27.9


def test_limits_are_inclusive() -> None:
    found = draws(400, 10, 13)
    assert set(found) == {10, 11, 12, 13}
    assert draws(3, 7, 7) == [7, 7, 7]
