from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from sdlora.common.bundled import BucketOptions
from sdlora.data.batches import assign_buckets, choose_bucket, count_batches, epoch_batches, make_buckets

BUCKETS = ["s", "s", "w", "s", "w", "s", "s"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("epoch", [1, 3])
def test_every_exposure_exactly_once_in_batches_of_one_bucket(batch_size: int, repeats: int, epoch: int) -> None:
    batches = epoch_batches(BUCKETS, repeats, batch_size, epoch, seed=1)
    seen = Counter((exposure.example, exposure.number) for batch in batches for exposure in batch)
    numbers = range((epoch - 1) * repeats + 1, epoch * repeats + 1)
    assert seen == Counter((example, number) for example in range(len(BUCKETS)) for number in numbers)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({BUCKETS[exposure.example] for exposure in batch}) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("repeats", [[1] * 7, [3, 1, 4, 2, 5, 1, 2]])
def test_buckets_of_an_image_take_turns(batch_size: int, repeats: list[int]) -> None:
    turns = ["st", "ts", "uvw", "st", "s", "vwu", "ts"]
    found = [epoch_batches(turns, repeats, batch_size, epoch, seed=1) for epoch in (1, 2, 3)]
    numbers: dict[int, list[int]] = {}
    for batch in (batch for batches in found for batch in batches):
        assert 1 <= len(batch) <= batch_size
        assert len({turns[e.example][(e.number - 1) % len(turns[e.example])] for e in batch}) == 1
        for exposure in batch:
            numbers.setdefault(exposure.example, []).append(exposure.number)
    assert {index: sorted(some) for index, some in numbers.items()} == {
        index: list(range(1, 3 * times + 1)) for index, times in enumerate(repeats)
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_repeats_of_each_image_are_spread_over_the_epoch(batch_size: int) -> None:
    repeats = [1, 12, 3, 4, 12, 1, 6]
    batches = epoch_batches(["s"] * 7, repeats, batch_size, 2, seed=1)
    order = [exposure for batch in batches for exposure in batch]
    for index, times in enumerate(repeats):
        places = [place for place, exposure in enumerate(order) if exposure.example == index]
        assert [order[place].number for place in places] == list(range(times + 1, 2 * times + 1))
        gaps = [late - early for early, late in pairwise(places)]
        assert not gaps or max(gaps) < 2 * len(order) / times
    assert epoch_batches(BUCKETS, [4] * 7, 2, 1, 0) == epoch_batches(BUCKETS, 4, 2, 1, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("buckets", [BUCKETS, [("a", "b", "c"), ("a",), ("b", "a")] * 3])
def test_batches_are_counted_without_drawing_their_order(buckets: list[Any], batch_size: int) -> None:
    repeats = [1 + 3 * index % 7 for index in range(len(buckets))]
    for epoch in (1, 2, 5):
        assert count_batches(buckets, repeats, batch_size, epoch) == len(
            epoch_batches(buckets, repeats, batch_size, epoch, seed=1)
        )


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_batches(BUCKETS, 2, 2, 1, 0) == epoch_batches(BUCKETS, 2, 2, 1, 0)
    orders = {tuple(v.example for b in epoch_batches(BUCKETS, 2, 2, e, s) for v in b) for e in (1, 2) for s in (0, 1)}
    assert len(orders) == 4


def test_batch_rarely_contains_an_image_twice() -> None:
    batches = epoch_batches(["s"] * 8, 10, 4, 1, 0)
    assert all(len({exposure.example for exposure in batch}) == 4 for batch in batches)


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (64, 8), (320, 64), (64, 64), (100, 64)])
def test_buckets_keep_area_step_and_aspect(resolution: int, step: int) -> None:
    buckets = make_buckets(resolution, step)
    assert (resolution, resolution) in buckets
    for width, height in buckets:
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)
        assert (height, width) in buckets
        if (width, height) != (resolution, resolution):
            assert width % step == height % step == 0


def test_known_sizes_of_stable_diffusion() -> None:
    assert {(512, 512), (448, 576), (384, 640), (640, 384)} <= set(make_buckets(512, 64))


def test_sizes_of_stable_diffusion_xl_are_among_those_it_was_trained_at() -> None:
    # Podell et al. 2307.01952, appendix I, as far as an aspect ratio of 2; each is trained lying as well.
    published = {(704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152),
                 (896, 1088), (960, 1088), (960, 1024), (1024, 1024)}  # fmt: skip
    upright = {bucket for bucket in make_buckets(1024, 64) if bucket[0] <= bucket[1]}
    assert upright == {(768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)} <= published


def test_nearest_aspect_ratio_is_chosen() -> None:
    buckets = make_buckets(512, 64)
    assert choose_bucket(3000, 3000, buckets) == (512, 512)
    assert choose_bucket(1920, 1080, buckets) == (640, 384)
    assert choose_bucket(1080, 1920, buckets) == (384, 640)
    assert choose_bucket(4000, 10, buckets)[0] > choose_bucket(4000, 10, buckets)[1]


def test_buckets_are_assigned_in_order() -> None:
    sizes = [(100, 100), (300, 150), (150, 300)]
    assert assign_buckets(sizes, 32, BucketOptions(8)) == [(32, 32), (40, 24), (24, 40)]
    assert assign_buckets(sizes, 32, BucketOptions(8, buckets=False)) == [(32, 32)] * 3


def test_small_images_get_the_largest_size_that_they_fill() -> None:
    sizes = {
        (512, 512): (512, 512), (2000, 100): (128, 64), (500, 700): (448, 576), (500, 500): (448, 448),
        (300, 500): (256, 448), (500, 300): (448, 256), (200, 399): (192, 384), (60, 70): (64, 64),
        (1000, 1000): (512, 512),
    }  # fmt: skip
    options = BucketOptions(64, no_upscale=True)
    assert dict(zip(sizes, assign_buckets([*sizes], 512, options), strict=True)) == sizes
    squares = assign_buckets([(300, 500), (800, 900)], 512, replace(options, buckets=False))
    assert squares == [(256, 256), (512, 512)]


def test_aspect_ratio_of_buckets_is_limited() -> None:
    sizes = [(1000, 200), (700, 500), (200, 1000)]
    found = [assign_buckets(sizes, 512, BucketOptions(64, max_aspect=aspect)) for aspect in (1.0, 2.0, 5.0)]
    assert found == [
        [(512, 512)] * 3, [(640, 384), (576, 448), (384, 640)], [(1024, 256), (576, 448), (256, 1024)],
    ]  # fmt: skip
