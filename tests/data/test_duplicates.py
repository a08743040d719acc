from collections.abc import Callable

import duplicates
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sdlora.common.bundled import resolve_data_folder
from sdlora.data.duplicates import MIN_CORRELATION, near_duplicates, thumbnail
from sdlora.data.images import load_image
from sdlora.pocket.world import random_scene, render

SCENES = [render(random_scene(number)) for number in range(20_000, 20_300)]


def test_thumbnail_is_detail_in_colour() -> None:
    small = SCENES[0].resize((16, 16), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(small, dtype=np.float64)).permute(2, 0, 1).unsqueeze(0)
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    detail = (pixels - torch.nn.functional.avg_pool2d(padded, 5, stride=1))[0]
    expected = detail - detail.mean(dim=(1, 2), keepdim=True)
    expected = (expected / expected.norm()).permute(1, 2, 0).flatten()
    np.testing.assert_allclose(thumbnail(SCENES[0]), expected.numpy(), atol=1e-6)


def test_flat_images_are_not_near_duplicates() -> None:
    flat = [thumbnail(Image.new("RGB", (40, 40), color)) for color in ("red", "blue", "black")]
    assert not np.any(flat)
    assert near_duplicates(np.stack(flat)) == []


def test_different_scenes_are_not_near_duplicates() -> None:
    assert near_duplicates(np.stack([thumbnail(scene) for scene in SCENES])) == []


@pytest.mark.parametrize("change", duplicates.COPIES.values(), ids=duplicates.COPIES)
def test_copies_are_near_duplicates(change: Callable[[Image.Image], Image.Image]) -> None:
    scenes = SCENES[:50]
    found = near_duplicates(np.stack([thumbnail(s) for s in scenes] + [thumbnail(change(s)) for s in scenes]))
    assert found == [(index, index + 50) for index in range(50)]


def test_strong_changes_are_not_found() -> None:
    for change in duplicates.HARD.values():
        assert duplicates.copies(SCENES[:50], change).min() < MIN_CORRELATION


def test_group_contains_all_linked_images() -> None:
    copies = [SCENES[0], SCENES[1], ImageOps.mirror(SCENES[0]), SCENES[1], duplicates.warmer(SCENES[0])]
    assert near_duplicates(np.stack([thumbnail(copy) for copy in copies])) == [(0, 2, 4), (1, 3)]


@pytest.mark.parametrize("name", ["zumi", "blueprint"])
def test_bundled_sets_contain_no_near_duplicates(name: str) -> None:
    files = sorted(resolve_data_folder(f"builtin:{name}").glob("**/*.png"))
    assert near_duplicates(np.stack([thumbnail(load_image(file, "white")) for file in files])) == []
