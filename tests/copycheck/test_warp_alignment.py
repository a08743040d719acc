"""Images that were bent are laid onto one another again; images that only show the same are not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from concepts import CONCEPTS
from copy_sets import degrade, warp
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates

from sdlora.copycheck.similarity import SIZE_PX, hp_ms, luma
from sdlora.copycheck.warp_alignment import register, registered


@pytest.fixture(scope="module")
def gallery() -> list[Image.Image]:
    return [CONCEPTS["kolo"].draw(index, 0)[0] for index in range(12)]


def _bent(images: list[Image.Image]) -> list[Image.Image]:
    return [degrade(warp(image, random.Random(i)), random.Random(100 + i)) for i, image in enumerate(images)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_bent_copies_score_above_fresh_renders(gallery: list[Image.Image], mirrored: bool) -> None:
    copies = [ImageOps.mirror(image) for image in _bent(gallery)] if mirrored else _bent(gallery)
    scores = registered(copies, gallery)
    fresh = registered([CONCEPTS["kolo"].draw(index, 1)[0] for index in range(12)], gallery).amax(dim=1)
    assert scores.argmax(dim=1).tolist() == list(range(12))
    assert scores.diagonal().min() > 0.85
    assert float((scores.diagonal().unsqueeze(1) > fresh).float().mean()) > 0.9
    # Without bending they are told from fresh renders by chance only.
    still = hp_ms([CONCEPTS["kolo"].draw(index, 1)[0] for index in range(12)], gallery).amax(dim=1)
    assert float((hp_ms(copies, gallery).diagonal().unsqueeze(1) > still).float().mean()) < 0.8


def test_a_known_displacement_is_found() -> None:
    """By scipy's interpolation, within a fraction of a pixel wherever there is something to see."""
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


def test_a_image_that_is_there_already_stays_where_it_is(gallery: list[Image.Image]) -> None:
    same = luma(gallery[:3])[:, 0]
    assert register(same, same).abs().max() < 1e-3
    torch.testing.assert_close(registered(gallery, gallery).diagonal(), torch.ones(12), atol=1e-4, rtol=0)


def test_pairs_that_do_not_count_are_passed_over(gallery: list[Image.Image]) -> None:
    own = torch.eye(12, dtype=torch.bool)
    scores = registered(gallery, gallery, excluded=own)
    assert (scores.diagonal() == -1).all()
    assert ((scores > -1).sum(dim=1) == 2).all()  # the next two are looked at instead
    assert (registered(gallery[:1], gallery[:1], excluded=own[:1, :1]) == -1).all()


def test_nothing_is_like_nothing(gallery: list[Image.Image]) -> None:
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    assert registered([grey], [grey, gallery[0]]).amax() < 0.1
    with pytest.raises(ValueError, match="both need at least one"):
        registered([], [grey])


def test_a_score_does_not_depend_on_what_it_is_computed_with(gallery: list[Image.Image]) -> None:
    torch.testing.assert_close(registered(gallery[3:4], gallery)[0], registered(gallery, gallery)[3], atol=1e-5, rtol=0)
