from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer

from sdlora.common import seeds
from sdlora.events import EpochDone
from sdlora.training.data import TrainingData
from sdlora.training.validation import Validation, image_losses


def means_by_band(data: TrainingData, seed: int) -> list[float]:
    found: list[float] = image_losses(data, range(len(data.dataset.examples)), seed).mean(dim=(0, 2)).tolist()
    return found


def test_bands_are_means_over_fixed_timesteps_and_noise(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    data, base = trainer.data, trainer.base
    expected: list[list[float]] = [[] for _ in range(5)]
    for index, example in enumerate(data.dataset.examples):
        latents = data.moments([index])[0, :4] * base.vae.config.scaling_factor  # type: ignore[attr-defined]
        for level in range(50, 1000, 100):
            noise = seeds.normal((4, 8, 8), 3, "heldout noise", example.name, level)
            alpha = base.alphas_cumprod[level]
            noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).unsqueeze(0)
            with torch.no_grad():
                states = base.encode_captions([example.caption])["states"]
                answer = base.unet(noisy, torch.tensor([level]), states).sample
            expected[level // 200].append(float((answer - noise).pow(2).mean()))
    found = means_by_band(data, 3)
    assert found == pytest.approx([sum(losses) / 10 for losses in expected], abs=1e-5)
    assert means_by_band(data, 3) == found != means_by_band(data, 4)


def test_change_is_loss_with_adapter_on_minus_off(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    fresh = Validation(trainer.data, trainer.adapter, 3)
    base = fresh.measure(EpochDone(0, 0, None, None, 0.0))
    assert base.validation_bands == means_by_band(trainer.data, 3)
    assert base.validation_loss == pytest.approx(sum(base.validation_bands or []) / 5)
    assert base.validation_change == [0.0] * 5, "B is zero: nothing has moved"
    with torch.no_grad():
        for parameter in trainer.adapter.up_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    event = EpochDone(1, 5, 0.5, None, 2.0, [0.5] * 5)
    moved = fresh.measure(event)
    on, off = moved.validation_bands or [], base.validation_bands or []
    assert moved.validation_change == [a - b for a, b in zip(on, off, strict=True)]
    assert all(abs(change) > 1e-6 for change in moved.validation_change)
    assert (moved.train_loss, moved.train_bands, moved.seconds) == (0.5, [0.5] * 5, 2.0)
    # As in a resumed run, which first measures in the middle.
    assert Validation(trainer.data, trainer.adapter, 3).measure(event) == moved


def test_losses_of_an_image_do_not_depend_on_other_images(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    data = make_trainer(tiny_base, images, tmp_path).data
    everything = image_losses(data, range(5), 3)
    assert everything.shape == (5, 5, 2)
    assert torch.equal(image_losses(data, [3, 1], 3), everything[[3, 1]])
    # Ten levels of five images in float64, by hand.
    by_hand = everything.double().sum(dim=(0, 2)) / 10
    assert means_by_band(data, 3) == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_measured_losses_of_images_are_kept(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    measured = Validation(trainer.data, trainer.adapter, 3)
    assert measured.losses_off is None
    assert measured.losses_on is None
    event = EpochDone(0, 0, None, None, 0.0)
    measured.measure(event)
    assert measured.losses_on is not None
    assert measured.losses_off is not None
    assert torch.equal(measured.losses_on, measured.losses_off), "B is zero: nothing has moved"
    base = measured.losses_off
    with torch.no_grad():
        for parameter in trainer.adapter.up_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    measured.measure(event)
    assert torch.equal(measured.losses_off, base)
    assert torch.equal(measured.losses_on, image_losses(trainer.data, range(5), 3))
    assert not torch.equal(measured.losses_on, base)
