"""A few images kept out of training, so that the run can be judged by what it has not seen."""

from __future__ import annotations

from dataclasses import replace

from sdlora.common import seeds
from sdlora.data.dataset import Dataset

FEWEST_IMAGES = 20
MOST_SPLIT_OFF = 4


def split_off(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """Divide a set into what is trained and what is held out: 2 of 20 images, 3 of 30, 4 of 40 or more.

    Which images are held out is a function of the seed and of their names, each name counting for itself; so one
    more image in the folder exchanges one of the validation images at most, as long as their number stays.

    Args:
        dataset: The whole set.
        seed: The run's seed.

    Returns:
        The images to train and the validation ones; the whole set and None if there are fewer than 20.
    """
    names = [example.name for example in dataset.examples]
    if len(names) < FEWEST_IMAGES:
        return dataset, None
    count = min(MOST_SPLIT_OFF, len(names) // 10)
    chosen = set(sorted(names, key=lambda name: seeds.derive(seed, "heldout split", name))[:count])
    trained = tuple(example for example in dataset.examples if example.name not in chosen)
    validation = tuple(example for example in dataset.examples if example.name in chosen)
    return replace(dataset, examples=trained), replace(dataset, examples=validation, notices=())
