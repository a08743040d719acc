"""The null: what is in it, what is left out of it, and that it is made once."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from sdlora.cache.tensors import Cache
from sdlora.copycheck import null_distribution
from sdlora.copycheck.embedders import Arbiters
from sdlora.copycheck.null_distribution import (
    SIZE,
    Gallery,
    NullMaker,
    null_scores,
    reduced,
    registered_null,
    spread_over,
)
from sdlora.copycheck.warp_alignment import registered
from sdlora.lora.inject import inject
from sdlora.lora.targets import find_targets
from sdlora.models.load import load_base
from sdlora.pocket.world import random_scene, render
from sdlora.previews.sampler import PreviewRequest

REQUEST = PreviewRequest(("a red cat", "a dog"), (0,), "", 2, 5.0)


def scenes(*numbers: int) -> dict[str, Image.Image]:
    return {f"{number}.png": render(random_scene(number)) for number in numbers}


def test_every_image_is_compared_with_the_others_only() -> None:
    trained, validation = scenes(0, 1, 2, 3), scenes(10, 11)
    drawn = list(scenes(20).values())
    found = null_scores(Gallery(trained, validation), drawn, Arbiters())
    assert found.shape == (4 + 2 + 1, 2)
    images = list(trained.values())
    for index in range(4):
        others = images[:index] + images[index + 1 :]
        assert torch.allclose(found[index], Arbiters().scores([images[index]], others).amax(dim=1)[0], atol=1e-5)
    assert torch.allclose(found[4:6], Arbiters().scores(list(validation.values()), images).amax(dim=1), atol=1e-5)
    assert torch.allclose(found[6:], Arbiters().scores(drawn, images).amax(dim=1), atol=1e-5)


def test_near_duplicates_in_the_set_are_no_measure_of_similarity() -> None:
    trained = scenes(0, 1, 2)
    twin = {"twin.png": ImageOps.mirror(trained["0.png"])}
    found = null_scores(Gallery(trained | twin, {}), [], Arbiters())
    assert float(found.max()) < 0.99
    plain = null_scores(Gallery(trained, {}), [], Arbiters())
    # A hash is not quite the same seen in a mirror, so the third image may be nearer to the twin.
    assert torch.allclose(found[:2], plain[:2], atol=1e-5) and torch.allclose(found[:, 0][:3], plain[:, 0], atol=1e-5)


def test_one_image_alone_has_no_others_to_be_compared_with() -> None:
    drawn = list(scenes(5, 6).values())
    assert null_scores(Gallery(scenes(0), {}), drawn, Arbiters()).shape == (2, 2)


def test_the_sets_images_are_registered_to_one_another_but_not_to_their_twins() -> None:
    trained, validation = scenes(0, 1, 2), scenes(10)
    images = list(trained.values())
    found = registered_null(Gallery(trained | {"twin.png": ImageOps.mirror(images[0])}, validation), 24)
    assert found.shape == (5,)
    assert torch.allclose(found[0], registered([images[0]], images[1:]).amax(), atol=1e-5)
    assert torch.allclose(found[4], registered(list(validation.values()), images).amax(), atol=1e-2)
    assert registered_null(Gallery(trained, validation), 2).shape == (3,)
    assert registered_null(Gallery(scenes(0), {}), 24).shape == (0,)


def test_what_is_asked_is_spread_over_the_set() -> None:
    assert spread_over(24, 4) == [0, 6, 12, 18]
    assert spread_over(3, 4) == [0, 1, 2]
    assert spread_over(5, 4) == [0, 1, 2, 3]
    assert spread_over(0, 4) == []


def test_large_images_are_reduced_and_small_ones_left_alone() -> None:
    large, small = Image.new("L", (1000, 500)), render(random_scene(0))
    assert reduced(large).size == (384, 192)
    assert reduced(large).mode == "RGB"
    assert reduced(small).tobytes() == small.tobytes()


@pytest.fixture
def maker(tiny_base: Path, tmp_path: Path) -> NullMaker:
    return make(tiny_base, tmp_path)


def make(tiny_base: Path, folder: Path, request: PreviewRequest = REQUEST, identity: str = "unet") -> NullMaker:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.unet, find_targets(base.unet, ["cross_attention"], base.text_encoders), 2, 2.0, 0)
    with torch.no_grad():
        for up in adapter.up_parameters():
            up.fill_(0.5)
    gallery = Gallery(scenes(0, 1, 2), scenes(9))
    return NullMaker(Cache(folder, base), adapter, request, gallery, identity, Arbiters())


def test_the_null_is_large_enough_for_a_test_at_one_percent(maker: NullMaker) -> None:
    list(maker.make())
    assert maker.scores is not None
    assert maker.scores.shape == (SIZE, 2)


def test_the_second_run_draws_and_computes_nothing(
    maker: NullMaker, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(maker.make())
    assert sum(1 for _ in tmp_path.glob("drawn/*/*.png")) == first[-1].total == SIZE - 4
    again = make(tiny_base, tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(null_distribution, "draw", refuse)
    monkeypatch.setattr(null_distribution, "null_scores", refuse)
    monkeypatch.setattr(null_distribution, "registered_null", refuse)
    assert list(again.make()) == []
    assert again.scores is not None and maker.scores is not None
    assert torch.equal(again.scores, maker.scores)
    assert again.registered is not None and maker.registered is not None
    assert torch.equal(again.registered, maker.registered) and len(again.registered) == 4
    # Another base, other settings: nothing fits.
    with pytest.raises(AssertionError, match="computed again"):
        list(make(tiny_base, tmp_path, identity="another").make())
    with pytest.raises(AssertionError, match="computed again"):
        list(make(tiny_base, tmp_path, PreviewRequest(("a red cat", "a dog"), (0,), "", 3, 5.0)).make())


def test_the_base_draws_it_whatever_the_adapter_is(maker: NullMaker, tiny_base: Path, tmp_path: Path) -> None:
    list(maker.make())
    other = make(tiny_base, tmp_path / "other")
    with torch.no_grad():
        for up in other._adapter.up_parameters():
            up.fill_(-2.0)
    list(other.make())
    assert other.scores is not None and maker.scores is not None
    assert torch.allclose(other.scores, maker.scores)
