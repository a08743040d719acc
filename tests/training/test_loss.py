"""The loss of exposures against formulas written out by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer
from PIL import Image

from sdlora.common import seeds
from sdlora.data.batches import Exposure
from sdlora.events import EpochDone
from sdlora.models.load import load_base
from sdlora.training.data import TrainingData
from sdlora.training.loss import Batch, diffusion_loss
from sdlora.training.validation import Validation, image_losses


def test_loss_of_an_exposure_equals_the_formula(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    base, example = trainer.base, trainer.data.dataset.examples[3]
    mean, log_variance = trainer.data.moments([3]).float().chunk(2, dim=1)
    jitter = seeds.normal((4, 8, 8), 0, "latent", example.name, 2)
    noise = seeds.normal((4, 8, 8), 0, "noise", example.name, 2)
    latents = (mean + torch.exp(log_variance / 2) * jitter) * base.vae.config.scaling_factor  # type: ignore[attr-defined]
    alpha = base.levels.alphas_cumprod[600]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        states = base.encode_captions([example.caption])["states"]
        answer = base.network(noisy, torch.tensor([600]), states).sample
        found = trainer.terms[0].loss([Exposure(3, 2)], [600])[0]
    torch.testing.assert_close(found, (answer - noise).pow(2).mean().unsqueeze(0))


def test_gradient_reaches_a_trained_text_encoder(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, targets=("text_encoder",))
    parameter = trainer.adapter.layers["text_encoder.encoder.layers.0.mlp.fc1"].up

    def loss() -> torch.Tensor:
        return trainer.terms[0].loss([Exposure(3, 2)], [600])[0].sum()

    loss().backward()
    assert parameter.grad is not None
    gradient, step = parameter.grad.clone(), 1e-2 / parameter.grad.norm()
    with torch.no_grad():
        parameter.add_(gradient * step)
        above = loss()
        parameter.sub_(2 * gradient * step)
        below = loss()
    slope = float((above - below) / (2 * step))
    assert slope == pytest.approx(float(gradient.square().sum()), rel=0.05)


def test_objective_is_the_weighted_loss(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, loss={"weighting": "min_snr", "gamma": 2.0})
    with torch.no_grad():
        loss, objective = trainer.terms[0].loss([Exposure(3, 2), Exposure(2, 1)], [20, 600])
    alphas_cumprod = trainer.base.levels.alphas_cumprod[[20, 600]].double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    torch.testing.assert_close(objective, (snr.clamp(max=2.0) / snr).float() * loss)


def test_masked_places_are_weighted_by_the_floor(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(images, folder)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 12))
    mask.save(folder / "blue-mask.png")
    trainer = make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.25})
    plain = make_trainer(tiny_base, images, tmp_path / "cache")
    # Latents of 4 x 4 pixels: the mask covers 4 columns of 3 rows.
    weights = torch.full((8, 8), 0.25)
    weights[:3, :4] = 1.0
    base, exposures = trainer.base, [Exposure(0, 1), Exposure(1, 1)]
    assert [trainer.data.name(exposure.example) for exposure in exposures] == ["blue.png", "green.png"]
    with torch.no_grad():
        found = trainer.terms[0].loss(exposures, [600, 600])[0]
        latents, noise = trainer.terms[0].loss.latents_and_noise(exposures)
        alpha = base.levels.alphas_cumprod[600]
        text = trainer.data.text([(0, 1), (1, 1)])
        answer = base.predict(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, torch.tensor([600, 600]), text)
        whole = plain.terms[0].loss(exposures, [600, 600])[0]
    errors = (answer - noise).pow(2)
    expected = (errors[0] * weights).sum() / (4 * weights.sum())
    torch.testing.assert_close(found, torch.stack([expected, errors[1].mean()]))
    torch.testing.assert_close(whole, errors.mean(dim=(1, 2, 3)))


def test_noise_offset_shifts_whole_channels(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    plain, shifted = (
        trainer.terms[0].loss.latents_and_noise([Exposure(3, 2)])
        for trainer in (make_trainer(tiny_base, images, tmp_path, loss=loss) for loss in ({}, {"noise_offset": 0.1}))
    )
    assert torch.equal(plain[0], shifted[0])
    name = "purple.png"
    expected = 0.1 * seeds.normal((4, 1, 1), 0, "noise offset", name, 2)
    torch.testing.assert_close(shifted[1][0] - plain[1][0], expected.expand(4, 8, 8), atol=1e-6, rtol=0)


def drawn_noise(base: Path, images: Path, cache: Path, **loss: object) -> torch.Tensor:
    trainer = make_trainer(base, images, cache, loss=loss)
    return trainer.terms[0].loss.latents_and_noise([Exposure(3, 2), Exposure(1, 1)])[1]


def test_strength_of_the_noise_offset_is_drawn_for_each_exposure(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    plain = drawn_noise(tiny_base, images, tmp_path)
    always = drawn_noise(tiny_base, images, tmp_path, noise_offset=0.1) - plain
    found = drawn_noise(tiny_base, images, tmp_path, noise_offset=0.1, noise_offset_random=True) - plain
    shares = [seeds.uniform(0, "noise offset strength", *name) for name in (("purple.png", 2), ("green.png", 1))]
    assert shares[0] != shares[1]
    expected = always * torch.tensor(shares).view(2, 1, 1, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_noise_of_several_resolutions_is_a_function_of_the_exposure(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    plain, found, again = (
        drawn_noise(tiny_base, images, tmp_path, multires_discount=discount) for discount in (0.0, 0.4, 0.4)
    )
    assert torch.equal(found, again) and not torch.equal(found, plain)
    # Whole channels shift more than those of plain noise.
    assert found.mean(dim=(2, 3)).abs().mean() > 2 * plain.mean(dim=(2, 3)).abs().mean()


def test_perturbation_is_in_the_input_and_not_in_the_target(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, loss={"input_perturbation": 0.1})
    base, term = trainer.base, trainer.terms[0].loss
    latents, noise = term.latents_and_noise([Exposure(3, 2)])
    more = 0.1 * seeds.normal((4, 8, 8), 0, "input perturbation", "purple.png", 2)
    alpha = base.levels.alphas_cumprod[600]  # type: ignore[attr-defined]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * (noise + more)
    with torch.no_grad():
        answer = base.predict(noisy, torch.tensor([600]), trainer.data.text([(3, 2)]))
        found = term([Exposure(3, 2)], [600])[0]
    torch.testing.assert_close(found, (answer - noise).pow(2).mean().unsqueeze(0))


def test_a_sets_weight_multiplies_its_objective(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    term, exposures = trainer.terms[0].loss, [Exposure(3, 2), Exposure(1, 1)]
    dataset = trainer.data.dataset
    examples = [replace(one, loss_weight=0.25 if index == 1 else 1.0) for index, one in enumerate(dataset.examples)]
    with torch.no_grad():
        plain = term(exposures, [20, 600])
        term.data = replace(term.data, dataset=replace(dataset, examples=tuple(examples)))
        list(term.data.fill("white"))
        loss, objective = term(exposures, [20, 600])
    assert torch.equal(loss, plain[0])
    torch.testing.assert_close(objective, plain[1] * torch.tensor([1.0, 0.25]))


def test_delta_of_each_exposure_follows_its_timestep(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    options = {"kind": "huber", "huber_delta": 0.05}
    with torch.no_grad():
        found, constant = (
            make_trainer(tiny_base, images, tmp_path, loss={**options, "huber_schedule": name})
            .terms[0]
            .loss([Exposure(3, 2), Exposure(1, 1)], [0, 999])[0]
            for name in ("exponential", "constant")
        )
    assert found[0] > 1.5 * constant[0]
    torch.testing.assert_close(found[1], constant[1], rtol=1e-2, atol=0)


def test_loss_uses_the_given_error(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    batch = Batch(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8), torch.tensor([5, 6]), base.encode_captions(["", ""]))
    with torch.no_grad():
        found = diffusion_loss(base, batch, lambda predicted, target, _: (predicted - target).abs().amax(dim=(1, 2, 3)))
        noisy = (1 - base.levels.alphas_cumprod[[5, 6]]).sqrt().view(-1, 1, 1, 1) * batch.noise
        answer = base.network(noisy, batch.timesteps, batch.text["states"]).sample
    assert found.tolist() == pytest.approx((answer - 1).abs().amax(dim=(1, 2, 3)).tolist(), rel=1e-5)


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
            alpha = base.levels.alphas_cumprod[level]
            noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).unsqueeze(0)
            with torch.no_grad():
                states = base.encode_captions([example.caption])["states"]
                answer = base.network(noisy, torch.tensor([level]), states).sample
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
