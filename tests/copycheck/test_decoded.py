"""What previews are compared with: images as they are, or behind a VAE that softens them."""

from pathlib import Path
from typing import Any

import pytest
from helpers.bases import load
from helpers.checks import drained
from PIL import Image, ImageFilter

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import ImageFolder
from sdlora.copycheck import decoded as module
from sdlora.copycheck.decoded import as_drawn
from sdlora.copycheck.scale import make_gallery
from sdlora.data.dataset import load_dataset
from sdlora.pocket.world import random_scene, render
from sdlora.training.data import evaluation_data


@pytest.fixture
def prepared(tiny_base: Path, tmp_path: Path) -> Any:
    datasets = []
    for name, first in (("set", 0), ("held", 10)):
        (tmp_path / name).mkdir()
        for index in range(first, first + 3):
            render(random_scene(index)).resize((32, 32)).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text("a scene")
        datasets.append(load_dataset(ImageFolder(str(tmp_path / name))))
    data = evaluation_data(datasets[0], Cache(tmp_path / "cache", load(tiny_base)), text_is_trained=False)
    list(data.fill("white"))
    return data, make_gallery(*datasets, "white")


def soft(*_: Any) -> Image.Image:
    return render(random_scene(0)).resize((32, 32)).filter(ImageFilter.GaussianBlur(2))


def test_images_that_the_vae_keeps_are_compared_as_they_are(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, gallery = prepared
    images = list(gallery.images.values())
    monkeypatch.setattr(module, "_decoded", lambda _, index, __: images[index])
    found, copy_of = drained(as_drawn(data, gallery))
    assert found is gallery
    assert copy_of(2) is images[2]


def test_images_that_the_vae_changes_are_compared_behind_it(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, gallery = prepared
    events = as_drawn(data, gallery)
    assert [event.done for event in list(events)] == [1, 2, 3, 4, 5, 6]
    base = data.cache.base
    found, copy_of = drained(as_drawn(data, gallery))
    assert list(found.images) == list(gallery.images) and list(found.validation) == list(gallery.validation)
    for index, (name, image) in enumerate(found.images.items()):
        again = module.through_vae(base, gallery.images[name])
        # The cache rounds latents to float16.
        difference = max(abs(a - b) for a, b in zip(image.tobytes(), again.tobytes(), strict=True))
        assert difference <= 3
        assert copy_of(index).tobytes() == module.through_vae(base, image).tobytes()
    name = next(iter(gallery.validation))
    assert found.validation[name].tobytes() == module.through_vae(base, gallery.validation[name]).tobytes()
    monkeypatch.setattr(module, "_at_mean", soft)
    kept, _ = drained(as_drawn(data, replace_validation(gallery)))
    assert [image.tobytes() for image in kept.images.values()] == [image.tobytes() for image in found.images.values()]


def replace_validation(gallery: Any) -> Any:
    return type(gallery)(gallery.images, {})


def test_what_does_not_fill_the_latents_is_cut_off(prepared: Any) -> None:
    data, _ = prepared
    assert module.through_vae(data.cache.base, Image.new("RGB", (37, 33))).size == (36, 32)
