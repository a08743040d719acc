"""Registration aligns warped copies, and not other images of the same subject."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from concepts import CONCEPTS
from copy_sets import degrade, warp
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates

from sdlora.copycheck.similarity import SIZE_PX, hp_ms, luma, register, registered_correlation


@pytest.fixture(scope="module")
def gallery() -> list[Image.Image]:
    return [CONCEPTS["kolo"].draw(index, 0)[0] for index in range(12)]


def _warped(images: list[Image.Image]) -> list[Image.Image]:
    return [degrade(warp(image, random.Random(i)), random.Random(100 + i)) for i, image in enumerate(images)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_warped_copies_score_above_fresh_renders(gallery: list[Image.Image], mirrored: bool) -> None:
    copies = [ImageOps.mirror(image) for image in _warped(gallery)] if mirrored else _warped(gallery)
    scores = registered_correlation(copies, gallery)
    fresh = registered_correlation([CONCEPTS["kolo"].draw(index, 1)[0] for index in range(12)], gallery).amax(dim=1)
    assert scores.argmax(dim=1).tolist() == list(range(12))
    assert scores.diagonal().min() > 0.85
    assert float((scores.diagonal().unsqueeze(1) > fresh).float().mean()) > 0.9
    # Without registration they score no better than fresh renders.
    still = hp_ms([CONCEPTS["kolo"].draw(index, 1)[0] for index in range(12)], gallery).amax(dim=1)
    assert float((hp_ms(copies, gallery).diagonal().unsqueeze(1) > still).float().mean()) < 0.8


def test_register_recovers_a_known_displacement() -> None:
    """Made by scipy's interpolation; recovered within a fraction of a pixel."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (16, 16), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    image = np.asarray(coarse, dtype=np.float64) / 255
    y, x = np.meshgrid(np.linspace(-1, 1, SIZE_PX), np.linspace(-1, 1, SIZE_PX), indexing="ij")
    right, down = 2.5 * x * y + 1.0, 2.0 * np.square(x) - 1.5 * y
    rows, columns = np.mgrid[0:SIZE_PX, 0:SIZE_PX]
    moved = map_coordinates(image, [rows + down, columns + right], order=3, mode="nearest")
    pair = [torch.from_numpy(values).float().unsqueeze(0) for values in (image, 0.6 * moved + 0.2)]
    found = register(*pair)[0]
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(found[0].numpy() - right)[inside].mean() < 0.2
    assert np.abs(found[1].numpy() - down)[inside].mean() < 0.2


def test_register_leaves_an_aligned_image_in_place(gallery: list[Image.Image]) -> None:
    same = luma(gallery[:3])[:, 0]
    assert register(same, same).abs().max() < 1e-3
    torch.testing.assert_close(registered_correlation(gallery, gallery).diagonal(), torch.ones(12), atol=1e-4, rtol=0)


def test_excluded_pairs_are_skipped(gallery: list[Image.Image]) -> None:
    own = torch.eye(12, dtype=torch.bool)
    scores = registered_correlation(gallery, gallery, excluded=own)
    assert (scores.diagonal() == -1).all()
    assert ((scores > -1).sum(dim=1) == 2).all()  # the next two are registered instead
    assert (registered_correlation(gallery[:1], gallery[:1], excluded=own[:1, :1]) == -1).all()


def test_flat_image_matches_nothing(gallery: list[Image.Image]) -> None:
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    assert registered_correlation([grey], [grey, gallery[0]]).amax() < 0.1
    with pytest.raises(ValueError, match="both need at least one"):
        registered_correlation([], [grey])


def test_score_does_not_depend_on_the_batch(gallery: list[Image.Image]) -> None:
    torch.testing.assert_close(
        registered_correlation(gallery[3:4], gallery)[0], registered_correlation(gallery, gallery)[3], atol=1e-5, rtol=0
    )
