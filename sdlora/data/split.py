"""The validation split: a few images kept out of training to measure the validation loss.

Used by a run whose images are 20 or more and that has no validation folder.
"""

from __future__ import annotations

from dataclasses import replace

from sdlora.common import seeds
from sdlora.data.dataset import Dataset

MIN_IMAGES = 20
MAX_VALIDATION_IMAGES = 4


def split_validation(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split a dataset into training and validation images: 2 of 20 images, 3 of 30, 4 of 40 or more.

    Each image's place in the draw depends only on the seed and its own name, so adding an image replaces at most one
    of the validation images, as long as their number stays the same.

    Args:
        dataset: All images.
        seed: The run's seed.

    Returns:
        Training and validation images; the whole dataset and None if there are fewer than 20 images.
    """
    names = [example.name for example in dataset.examples]
    if len(names) < MIN_IMAGES:
        return dataset, None
    count = min(MAX_VALIDATION_IMAGES, len(names) // 10)
    chosen = set(sorted(names, key=lambda name: seeds.derive(seed, "heldout split", name))[:count])
    trained = tuple(example for example in dataset.examples if example.name not in chosen)
    validation = tuple(example for example in dataset.examples if example.name in chosen)
    return replace(dataset, examples=trained), replace(dataset, examples=validation, notices=())
