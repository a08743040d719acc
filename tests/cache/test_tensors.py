import errno
from pathlib import Path
from typing import Never

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.data.dataset import Dataset, load_dataset
from sdlora.errors import ConfigError
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base


@pytest.fixture
def base(tiny_base: Path) -> BaseModel:
    return load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)


def dataset(folder: Path) -> Dataset:
    data = load_dataset(ImageFolder(str(folder), caption="x"))
    return data.with_buckets(32, BucketOptions(8))


def fill(cache: Cache, data: Dataset, captions: list[str]) -> None:
    list(cache.fill_moments(data.examples, "white"))
    list(cache.fill_text(captions))


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_cache_may_be_in_the_home_folder(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache(Path("~/cache"), base).folder == tmp_path / "cache"


def test_values_are_those_of_the_networks(base: BaseModel, images: Path, tmp_path: Path) -> None:
    cache, data = Cache(tmp_path, base), dataset(images)
    fill(cache, data, ["a cat", "a dog"])
    again = Cache(tmp_path, base)
    fill(again, data, ["a dog", "a cat"])
    for found in (cache, again):
        assert found.moments(data.examples[:1]).shape == (1, 8, 8, 8)
        expected = base.encode_captions(["a dog"])["states"]
        torch.testing.assert_close(found.text(["a dog"])["states"], expected, rtol=5e-4, atol=1e-6)
        assert not torch.equal(found.text(["a cat"])["states"], expected)


def test_a_changed_caption_recomputes_that_caption_and_nothing_else(
    base: BaseModel, images: Path, tmp_path: Path
) -> None:
    fill(Cache(tmp_path, base), dataset(images), ["a cat", "a dog"])
    before = written(tmp_path)
    fill(Cache(tmp_path, base), dataset(images), ["a cat", "a big dog"])
    after = written(tmp_path)
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_changed_pixels_under_the_same_name_are_noticed(base: BaseModel, tmp_path: Path) -> None:
    found = []
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / "a.png")
        cache, data = Cache(tmp_path / "cache", base), dataset(tmp_path)
        fill(cache, data, [])
        found.append(cache.moments(data.examples[:1]))
    assert not torch.equal(*found)


def test_another_network_has_other_keys(base: BaseModel, images: Path, tmp_path: Path, tiny_base: Path) -> None:
    fill(Cache(tmp_path, base), dataset(images), ["a cat"])
    before = written(tmp_path)
    other = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    other.vae_identity = other.text_identity = "another"
    fill(Cache(tmp_path, other), dataset(images), ["a cat"])
    assert len(written(tmp_path)) == 2 * len(before)


def test_text_that_is_not_kept_is_the_same_text(base: BaseModel, tmp_path: Path) -> None:
    cache, live = Cache(tmp_path / "kept", base), Cache(tmp_path / "live", base)
    live.keeps_text = False
    captions = ["a cat", "a dog", "a cat"]
    for one in (cache, live):
        list(one.fill_text(captions))
    assert torch.equal(cache.text(captions)["states"], live.text(captions)["states"])
    assert not list((tmp_path / "live").rglob("*.safetensors"))
    kept = [load_file(file)["states"] for file in (tmp_path / "kept").rglob("*.safetensors")]
    assert cache.text_bytes(2) == sum(states.numel() * states.element_size() for states in kept)
    with pytest.raises(KeyError):
        cache.text(["never filled"])


def test_a_torn_file_is_made_anew(base: BaseModel, images: Path, tmp_path: Path) -> None:
    fill(Cache(tmp_path, base), dataset(images), ["a cat"])
    (torn,) = (tmp_path / "text").rglob("*.safetensors")
    torn.write_bytes(torn.read_bytes()[:20])
    cache = Cache(tmp_path, base)
    fill(cache, dataset(images), ["a cat"])
    torch.testing.assert_close(
        cache.text(["a cat"])["states"], base.encode_captions(["a cat"])["states"], rtol=5e-4, atol=1e-6
    )


def test_what_a_run_reads_is_mapped_whether_it_was_there_or_not(
    base: BaseModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(images)
    for _ in ("made", "found"):
        cache = Cache(tmp_path, base)
        fill(cache, data, ["a cat"])
        with monkeypatch.context() as patch:
            patch.setattr("sdlora.cache.tensors.load_file", None)  # nothing is opened any more
            found = {example.name: cache.moments([example]) for example in data.examples}
            states = cache.text(["a cat"])["states"]
        names = {str(path) for path in tmp_path.rglob("*.safetensors")}
        if (maps := Path("/proc/self/maps")).exists():
            assert all(name in maps.read_text() for name in names)
        torch.testing.assert_close(states, base.encode_captions(["a cat"])["states"], rtol=5e-4, atol=1e-6)
        assert all(moments.isfinite().all() for moments in found.values())


def test_numbers_that_are_mapped_outlive_their_file(base: BaseModel, images: Path, tmp_path: Path) -> None:
    cache, data = Cache(tmp_path, base), dataset(images)
    fill(cache, data, [])
    before = cache.moments(data.examples[:1]).clone()
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert torch.equal(cache.moments(data.examples[:1]), before)


def test_read_only_folder_serves_what_it_holds_and_refuses_the_rest_in_words(
    base: BaseModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Cache(tmp_path, base), dataset(images), ["a cat"])

    def no(path: Path) -> Never:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("sdlora.cache.tensors.atomic_path", no)
    fill(Cache(tmp_path, base), dataset(images), ["a cat"])
    with pytest.raises(ConfigError, match=r"cache\.dir: .* cannot be written \(Read-only file system\)"):
        fill(Cache(tmp_path, base), dataset(images), ["a cat", "a dog"])
