import pytest

from sdlora.data.buckets import assign_buckets, choose_bucket, make_buckets


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
    assert assign_buckets(sizes, 32, 8, buckets=True) == [(32, 32), (40, 24), (24, 40)]
    assert assign_buckets(sizes, 32, 8, buckets=False) == [(32, 32)] * 3
