"""Features of the base model's UNet: which block, what they say of copies, and that they are computed once."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bases import load
from helpers.tiny import make_tiny, make_tiny_z_image
from PIL import Image

from sdlora.cache.tensors import Cache
from sdlora.copycheck import features as module
from sdlora.copycheck.features import Features, agreement, feature_block
from sdlora.data.dataset import Example
from sdlora.models.base import BaseModel
from sdlora.pocket.world import random_scene, render


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=0)


def test_agreement_is_the_best_mean_cosine_over_displacements() -> None:
    first, second = unit(8, 6, 6), unit(8, 6, 5, seed=1)
    best = -1.0
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            rows = [y for y in range(6) if 0 <= y + dy < 6]
            columns = [x for x in range(6) if 0 <= x + dx < 5]
            if len(rows) * len(columns) >= 0.25 * 30:
                over = second[:, [y + dy for y in rows]][:, :, [x + dx for x in columns]]
                best = max(best, float((first[:, rows][:, :, columns] * over).sum(dim=0).mean()))
    assert float(agreement([first], [second])) == pytest.approx(best, abs=1e-5)


def test_displaced_copy_of_another_shape_agrees() -> None:
    whole = unit(8, 6, 9)
    part = whole[:, :, 2:8]
    found = agreement([part, unit(8, 6, 6, seed=2)], [unit(8, 6, 9, seed=3), whole])
    assert found.shape == (2, 2)
    assert float(found[0, 1]) == pytest.approx(1.0, abs=1e-5)
    assert float(found.flatten()[[0, 2, 3]].max()) < 0.6


def images(count: int = 3, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    return [render(random_scene(index)).resize(size) for index in range(count)]


def features_of(base: BaseModel, off: Any = nullcontext) -> Features:
    block = feature_block(base.network)
    assert block is not None
    return Features(base, block, "network", off, Example("a.png", Path("a.png"), "", (32, 32), (32, 32)))


def test_copy_agrees_more_than_other_images(tiny_base: Path, tmp_path: Path) -> None:
    base = load(tiny_base)
    found = features_of(base)
    gallery = images()
    list(found.fit(gallery, Cache(tmp_path, base)))
    scores = found.similarity([*gallery, *images(4)[3:]], gallery)
    torch.testing.assert_close(scores[:3].diagonal(), torch.ones(3), atol=1e-4, rtol=0)
    assert float(scores[3].max()) < 0.9
    with pytest.raises(ValueError, match="gallery of 0"):
        found.similarity(gallery, [])


def test_features_are_read_from_the_cache(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(tiny_base)
    first, second = features_of(base), features_of(base)
    progress = list(first.fit(images(), Cache(tmp_path, base)))
    assert [event.done for event in progress] == [1, 2, 3]
    expected = first.similarity(images(), images())
    monkeypatch.setattr(Features, "_asked", None)
    assert list(second.fit(images(), Cache(tmp_path, base))) == []
    assert torch.equal(second.similarity(images(), images()), expected)
    with pytest.raises(TypeError):  # other images are other features
        list(features_of(base).fit(images(2), Cache(tmp_path, base)))


def test_channels_are_chosen_by_a_sample_of_a_large_set(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(tiny_base)
    monkeypatch.setattr(module, "_MAX_FITTED", 2)
    large, few = features_of(base), features_of(base)
    list(large.fit(images(4), Cache(tmp_path, base)))
    monkeypatch.undo()
    list(few.fit([images(4)[0], images(4)[2]], Cache(tmp_path, base)))
    torch.testing.assert_close(large._mean, few._mean)
    torch.testing.assert_close(large.similarity(images(4), images(4)).diagonal(), torch.ones(4), atol=1e-4, rtol=0)


def test_adapter_is_off_meanwhile(tiny_base: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    @contextmanager
    def off() -> Iterator[None]:
        asked.append("off")
        yield
        asked.append("on")

    base = load(tiny_base)
    found = features_of(base, off)
    base.network.register_forward_hook(lambda *_: asked.append("network"))
    list(found.fit(images(1), Cache(tmp_path, base)))
    assert asked == ["off", "network", "on"]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_unet_has_a_block_and_images_keep_their_shapes(family: Any, tmp_path: Path) -> None:
    make_tiny(family, tmp_path / "base")
    base = load(tmp_path / "base")
    found = features_of(base)
    wide = images(1, (72, 40))
    list(found.fit([*images(2), *wide], Cache(tmp_path / "cache", base)))
    assert float(found.similarity(wide, wide)) == pytest.approx(1.0, abs=1e-4)
    assert found.similarity(wide, images(2)).shape == (1, 2)


def test_large_images_are_reduced() -> None:
    assert module._sized(Image.new("RGB", (384, 256)), 8).size == (288, 192)
    assert module._sized(Image.new("RGB", (64, 50)), 4).size == (64, 48)


def test_transformer_has_no_such_block(tmp_path: Path) -> None:
    make_tiny_z_image(tmp_path / "base")
    assert feature_block(load(tmp_path / "base").network) is None
