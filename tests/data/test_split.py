from pathlib import Path

import pytest

from sdlora.data.dataset import Dataset, Example
from sdlora.data.split import split_validation


def dataset(count: int) -> Dataset:
    names = [f"picture{index:03d}.png" for index in range(count)]
    return Dataset(Path("set"), tuple(Example(name, Path(name), "x", (8, 8), (8, 8)) for name in names), ("a notice",))


def names(data: Dataset) -> list[str]:
    return [example.name for example in data.examples]


@pytest.mark.parametrize(("count", "held"), [(20, 2), (29, 2), (30, 3), (40, 4), (400, 4)])
def test_two_to_four_images_are_split_off(count: int, held: int) -> None:
    whole = dataset(count)
    trained, validation = split_validation(whole, 0)
    assert validation is not None
    assert len(validation.examples) == held
    assert sorted(names(trained) + names(validation)) == names(whole)
    assert (trained.notices, validation.notices) == (("a notice",), ())


def test_fewer_than_twenty_images_are_not_split() -> None:
    assert split_validation(dataset(19), 0) == (dataset(19), None)


def test_split_is_a_function_of_seed_and_names() -> None:
    chosen = [names(part) for seed in range(8) if (part := split_validation(dataset(20), seed)[1])]
    assert len({tuple(names) for names in chosen}) > 4
    assert chosen[0] == names(split_validation(dataset(20), 0)[1] or dataset(0))
    one_more = names(split_validation(dataset(21), 0)[1] or dataset(0))
    assert len(set(one_more) & set(chosen[0])) >= 1
