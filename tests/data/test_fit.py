"""Images and the sizes that they are trained at."""

from __future__ import annotations

from sdlora.common.bundled import BucketOptions
from sdlora.data.batches import assign_buckets
from sdlora.data.fit import examine_lengths, examine_sizes


def test_small_images_and_lone_buckets_are_warnings() -> None:
    sizes = {"a.png": (64, 64), "b.png": (80, 64), "c.png": (64, 80)}
    buckets = {"a.png": (64, 64), "b.png": (64, 64), "c.png": (64, 72)}
    assert examine_sizes({"a.png": (64, 64)}, {"a.png": (64, 64)}) == []
    (alone,) = examine_sizes(sizes, buckets)
    assert (alone.kind, alone.severity, alone.files) == ("lone bucket", "warning", ("c.png",))
    assert "c.png (64 x 72)" in alone.message
    sizes["a.png"] = (64, 63)
    small, _ = examine_sizes(sizes, buckets)
    assert (small.kind, small.severity, small.files) == ("too small", "warning", ("a.png",))
    assert "a.png (64 x 63 for 64 x 64)" in small.message


def test_images_that_lose_more_than_a_fifth_to_the_crop_are_told() -> None:
    sizes = {"a.png": (6000, 600), "b.png": (4096, 1024), "c.png": (1080, 2400), "d.png": (1000, 800)}
    found = assign_buckets([*sizes.values()], 512, BucketOptions())
    cropped = next(f for f in examine_sizes(sizes, dict(zip(sizes, found, strict=True))) if f.kind == "cropped")
    assert cropped.files == ("a.png", "b.png", "c.png") and cropped.severity == "warning"
    assert "a.png keeps 17% (6000 x 600 for 640 x 384), b.png keeps 42%" in cropped.message
    assert "c.png keeps 75%" in cropped.message and "data.max_aspect = 8" in cropped.message
    del sizes["a.png"]
    wider = assign_buckets([*sizes.values()], 512, BucketOptions(max_aspect=4.0))
    kinds = [f.kind for f in examine_sizes(sizes, dict(zip(sizes, wider, strict=True)))]
    assert "cropped" not in kinds


def test_long_captions_are_counted_in_words() -> None:
    (one,), (two,) = (examine_lengths(dict.fromkeys(names, 80), 77) for names in ("a", "ab"))
    assert one.message.startswith("1 caption is longer than 77 tokens")
    assert two.message.startswith("2 captions are longer than 77 tokens")
