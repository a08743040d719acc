"""The null: what is in it, what is left out of it, and that it is made once."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.null_distribution import (
    SIZE,
    Gallery,
    evenly_spaced,
    null_distribution,
    null_scores,
    reduced,
    registered_null_scores,
)
from sdlora.copycheck.similarity import registered_correlation
from sdlora.events import Progress
from sdlora.lora.inject import find_targets, inject
from sdlora.models.load import load_base
from sdlora.pocket.world import random_scene, render
from sdlora.previews.sampler import PreviewRequest

REQUEST = PreviewRequest(("a red cat", "a dog"), (0,), "", 2, 5.0)


def scenes(*numbers: int) -> dict[str, Image.Image]:
    return {f"{number}.png": render(random_scene(number)) for number in numbers}


def test_null_scores_exclude_the_image_itself() -> None:
    trained, validation = scenes(0, 1, 2, 3), scenes(10, 11)
    drawn = list(scenes(20).values())
    found = null_scores(Gallery(trained, validation), drawn, Embedders())
    assert found.shape == (4 + 2 + 1, 2)
    images = list(trained.values())
    for index in range(4):
        others = images[:index] + images[index + 1 :]
        assert torch.allclose(found[index], Embedders().scores([images[index]], others).amax(dim=1)[0], atol=1e-5)
    assert torch.allclose(found[4:6], Embedders().scores(list(validation.values()), images).amax(dim=1), atol=1e-5)
    assert torch.allclose(found[6:], Embedders().scores(drawn, images).amax(dim=1), atol=1e-5)


def test_null_scores_exclude_near_duplicates() -> None:
    trained = scenes(0, 1, 2)
    twin = {"twin.png": ImageOps.mirror(trained["0.png"])}
    found = null_scores(Gallery(trained | twin, {}), [], Embedders())
    assert float(found.max()) < 0.99
    plain = null_scores(Gallery(trained, {}), [], Embedders())
    # A mirrored image's hash differs slightly, so the third image may be nearer to the twin.
    assert torch.allclose(found[:2], plain[:2], atol=1e-5) and torch.allclose(found[:, 0][:3], plain[:, 0], atol=1e-5)


def test_null_scores_of_one_training_image_come_from_drawn_images() -> None:
    drawn = list(scenes(5, 6).values())
    assert null_scores(Gallery(scenes(0), {}), drawn, Embedders()).shape == (2, 2)


def test_registered_null_scores_exclude_near_duplicates() -> None:
    trained, validation = scenes(0, 1, 2), scenes(10)
    images = list(trained.values())
    found = registered_null_scores(Gallery(trained | {"twin.png": ImageOps.mirror(images[0])}, validation), 24)
    assert found.shape == (5,)
    assert torch.allclose(found[0], registered_correlation([images[0]], images[1:]).amax(), atol=1e-5)
    assert torch.allclose(found[4], registered_correlation(list(validation.values()), images).amax(), atol=1e-2)
    assert registered_null_scores(Gallery(trained, validation), 2).shape == (3,)
    assert registered_null_scores(Gallery(scenes(0), {}), 24).shape == (0,)


def test_evenly_spaced_covers_the_range() -> None:
    assert evenly_spaced(24, 4) == [0, 6, 12, 18]
    assert evenly_spaced(3, 4) == [0, 1, 2]
    assert evenly_spaced(5, 4) == [0, 1, 2, 3]
    assert evenly_spaced(0, 4) == []


def test_only_large_images_are_reduced() -> None:
    large, small = Image.new("L", (1000, 500)), render(random_scene(0))
    assert reduced(large).size == (384, 192)
    assert reduced(large).mode == "RGB"
    assert reduced(small).tobytes() == small.tobytes()


def make(
    tiny_base: Path, folder: Path, request: PreviewRequest = REQUEST, identity: str = "unet", up: float = 0.5
) -> tuple[list[Progress], Tensor, Tensor]:
    """What is reported while the null distribution is made, its scores, and those after registration."""
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.unet, find_targets(base.unet, ["cross_attention"], base.text_encoders), 2, 2.0, 0)
    with torch.no_grad():
        for factor in adapter.up_parameters():
            factor.fill_(up)
    gallery = Gallery(scenes(0, 1, 2), scenes(9))
    made = null_distribution(Cache(folder, base), adapter, request, gallery, identity, Embedders())
    told = []
    while True:
        try:
            told.append(next(made))
        except StopIteration as end:
            return told, *end.value


def test_null_distribution_has_the_minimum_size(tiny_base: Path, tmp_path: Path) -> None:
    _, scores, _ = make(tiny_base, tmp_path)
    assert scores.shape == (SIZE, 2)


def test_second_run_reads_everything_from_the_cache(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, scores, registered = make(tiny_base, tmp_path)
    assert sum(1 for _ in tmp_path.glob("drawn/*/*.png")) == first[-1].total == SIZE - 4

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    for name in ("draw", "null_scores", "registered_null_scores"):
        monkeypatch.setattr(f"sdlora.copycheck.null_distribution.{name}", refuse)
    told, again, registered_again = make(tiny_base, tmp_path)
    assert told == []
    assert torch.equal(again, scores)
    assert torch.equal(registered_again, registered) and len(registered) == 4
    # Another base or other settings miss the cache.
    with pytest.raises(AssertionError, match="computed again"):
        make(tiny_base, tmp_path, identity="another")
    with pytest.raises(AssertionError, match="computed again"):
        make(tiny_base, tmp_path, PreviewRequest(("a red cat", "a dog"), (0,), "", 3, 5.0))


def test_null_distribution_does_not_depend_on_the_adapter(tiny_base: Path, tmp_path: Path) -> None:
    _, scores, _ = make(tiny_base, tmp_path)
    _, other, _ = make(tiny_base, tmp_path / "other", up=-2.0)
    assert torch.allclose(other, scores)
