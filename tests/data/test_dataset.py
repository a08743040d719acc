import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.data.dataset import Dataset, Example, Pixels, load_dataset, load_pixels, split_validation
from sdlora.errors import DataError


def load(folder: Path, *, allow_trigger_only: bool = False, **source: str) -> Dataset:
    return load_dataset(ImageFolder(str(folder), **source), allow_trigger_only=allow_trigger_only)


def test_examples_have_captions_and_buckets(images: Path) -> None:
    data = load(images).with_buckets(32, BucketOptions(8))
    found = {e.name: (e.caption, e.bucket) for e in data.examples}
    assert found["red.png"] == ("a red ball", (32, 32))
    assert found["purple.png"] == ("a purple ball", (40, 24))
    assert {e.bucket for e in load(images).with_buckets(32, BucketOptions(8, buckets=False)).examples} == {(32, 32)}
    wide = next(e for e in data.examples if e.name == "purple.png")
    assert load_pixels(wide, "white").size == (40, 24)


def test_several_resolutions_take_turns_in_every_epoch(images: Path) -> None:
    several = BucketOptions(8, resolutions_px=(16, 32))
    data = load(images).with_buckets(64, several)
    assert {e.name: (e.bucket, e.turns) for e in data.examples} == {
        "blue.png": ((32, 32), ((16, 16), (32, 32))), "green.png": ((32, 32), ((32, 32), (16, 16))),
        "orange.png": ((40, 24), ((16, 16), (40, 24))), "purple.png": ((40, 24), ((40, 24), (16, 16))),
        "red.png": ((32, 32), ((16, 16), (32, 32))),
    }  # fmt: skip
    seen = [replace(data.examples[0], flip=True).at_exposure(number) for number in range(1, 6)]
    assert [(e.bucket[0], e.is_mirrored) for e in seen] == [
        (16, False),
        (32, False),
        (16, True),
        (32, True),
        (16, False),
    ]
    assert seen[0] == seen[4] and load_pixels(seen[1], "white").size == (32, 32)
    assert [data.examples[0].first_like(number) for number in range(1, 8)] == [1, 2, 3, 4, 1, 2, 3]
    # Resolutions that an image fills alike are one.
    small = load(images).with_buckets(64, replace(several, resolutions_px=(32, 64), no_upscale=True))
    assert {(e.bucket, e.turns) for e in small.examples if e.name == "red.png"} == {((32, 32), ())}


def test_a_folder_may_have_sizes_of_its_own(images: Path, others: Path) -> None:
    own = BucketOptions(8, buckets=False, resolutions_px=(24,))
    data = load_dataset(ImageFolder(str(images), name="a"), ImageFolder(str(others), name="b", sizes=own))
    found = {e.name[0]: e for e in data.with_buckets(32, BucketOptions(8)).examples if e.size_px == (64, 32)}
    assert {name: (e.bucket, e.turns) for name, e in found.items()} == {"a": ((40, 24), ()), "b": ((24, 24), ())}


def test_all_invalid_files_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "good.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "cut.txt").write_text("fine")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "cut.png" in str(caught.value)
    assert "2 of 4 images have no caption: a.png, b.png" in str(caught.value)
    assert "good" not in str(caught.value)


def test_images_without_a_caption_get_the_common_one(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("own")
    assert [e.caption for e in load(tmp_path, caption="all").examples] == ["all", "own"]
    assert [e.caption for e in load(tmp_path, trigger="zumi", allow_trigger_only=True).examples] == ["", "own"]
    with pytest.raises(DataError):
        load(tmp_path, trigger="zumi")
    with pytest.raises(DataError):
        load(tmp_path, allow_trigger_only=True)


def test_two_different_captions_for_one_image_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "two"}))
    with pytest.raises(DataError, match=r"a\.png: a\.txt and metadata\.jsonl give different captions"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    assert load(tmp_path).examples[0].caption == "two"


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="contains no images"):
        load(tmp_path)


def test_ignored_subfolders_and_captions_are_in_the_notices(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "lonely.txt").write_text("y")
    for name in ("more", "holdout", ".hidden"):
        (tmp_path / name).mkdir()
    first, second = load(tmp_path).notices
    assert "more" in first and "holdout" not in first and "hidden" not in first
    assert "lonely.txt" in second


def test_pixels_are_read_on_access(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(images).with_buckets(32, BucketOptions(8))
    read: list[str] = []

    def noted(example: Example, background: str) -> Image.Image:
        read.append(example.name)
        return load_pixels(example, background)

    monkeypatch.setattr("sdlora.data.dataset.load_pixels", noted)
    pixels = Pixels(data, "white")
    assert list(pixels) == [example.name for example in data.examples] and len(pixels) == 5
    assert not read
    assert pixels["purple.png"].size == (40, 24)
    assert read == ["purple.png"]


def dataset_of(count: int) -> Dataset:
    names = [f"picture{index:03d}.png" for index in range(count)]
    return Dataset(tuple(Example(name, Path(name), "x", (8, 8), (8, 8)) for name in names), ("a notice",))


def names(data: Dataset) -> list[str]:
    return [example.name for example in data.examples]


@pytest.mark.parametrize(("count", "held"), [(20, 2), (29, 2), (30, 3), (40, 4), (400, 4)])
def test_two_to_four_images_are_split_off(count: int, held: int) -> None:
    whole = dataset_of(count)
    trained, validation = split_validation(whole, 0)
    assert validation is not None
    assert len(validation.examples) == held
    assert sorted(names(trained) + names(validation)) == names(whole)
    assert (trained.notices, validation.notices) == (("a notice",), ())


def test_fewer_than_twenty_images_are_not_split() -> None:
    assert split_validation(dataset_of(19), 0) == (dataset_of(19), None)


def test_split_is_a_function_of_seed_and_names() -> None:
    chosen = [names(part) for seed in range(8) if (part := split_validation(dataset_of(20), seed)[1])]
    assert len({tuple(names) for names in chosen}) > 4
    assert chosen[0] == names(split_validation(dataset_of(20), 0)[1] or dataset_of(0))
    one_more = names(split_validation(dataset_of(21), 0)[1] or dataset_of(0))
    assert len(set(one_more) & set(chosen[0])) >= 1
