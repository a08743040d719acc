"""The trainer's mathematics against what is written out by hand."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.trainer import make_trainer
from PIL import Image

from sdlora.common import seeds
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Source, load_dataset
from sdlora.diffusion.stratify import cover
from sdlora.diffusion.timesteps import Density
from sdlora.errors import DivergedError
from sdlora.events import CheckpointDue, StepDone
from sdlora.lora.inject import AdapterSpec
from sdlora.training.checkpoint import load_checkpoint, save_checkpoint
from sdlora.training.loss import Batch, diffusion_loss_with_prior
from sdlora.training.trainer import Trainer


def test_the_loss_of_a_exposure_is_the_formula(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    base, example = trainer.base, trainer.data.dataset.examples[3]
    mean, log_variance = trainer.data.moments([3]).float().chunk(2, dim=1)
    jitter = seeds.normal((4, 8, 8), 0, "latent", example.name, 2)
    noise = seeds.normal((4, 8, 8), 0, "noise", example.name, 2)
    latents = (mean + torch.exp(log_variance / 2) * jitter) * base.vae.config.scaling_factor  # type: ignore[attr-defined]
    alpha = base.alphas_cumprod[600]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        states = base.encode_captions([example.caption])["states"]
        answer = base.unet(noisy, torch.tensor([600]), states).sample
        found = trainer.losses_per_example([Exposure(3, 2)], [600])[0]
    torch.testing.assert_close(found, (answer - noise).pow(2).mean().unsqueeze(0))


def test_a_trained_text_encoder_gets_the_gradient_of_the_loss(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, targets=("text_encoder",))
    parameter = trainer.adapter.layers["text_encoder.encoder.layers.0.mlp.fc1"].up

    def loss() -> torch.Tensor:
        return trainer.losses_per_example([Exposure(3, 2)], [600])[0].sum()

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


def test_what_is_prior_is_the_answer_to_the_bases_own_text(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, targets=("text_encoder",), preservation_weight=1.0)
    with torch.no_grad():
        for parameter in trainer.adapter.up_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        latents, noise = trainer._latents_and_noise([Exposure(3, 2)], trainer.data)
        loss, objective = trainer.losses_per_example([Exposure(3, 2)], [600])
        found = objective - loss
        base, alpha = trainer.base, trainer.base.alphas_cumprod[600]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        moved = base.predict(noisy, torch.tensor([600]), base.encode_captions(["a cat"]))
        trainer.adapter.set_strength(0.0)
        kept = base.predict(noisy, torch.tensor([600]), base.encode_captions(["a cat"]))
    assert found.item() > 0
    torch.testing.assert_close(found, (moved - kept).pow(2).mean().unsqueeze(0), rtol=1e-4, atol=1e-6)


def test_dropout_acts_in_training_alone(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []
    for dropout in (0.0, 0.5, 0.5):
        trainer = make_trainer(tiny_base, images, tmp_path, spec=AdapterSpec(dropout=dropout), learning_rate=1e-2)
        list(trainer.events())
        kept.append(torch.cat([parameter.flatten() for parameter in trainer.parameters]))
        with torch.no_grad():
            assert torch.equal(*(trainer.losses_per_example([Exposure(0, 1)], [300])[0] for _ in range(2)))
            assert all(not layer.dropout_seeds for layer in trainer.adapter.layers.values())
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_a_rehearsal_leaves_nothing_behind(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    ends: list[torch.Tensor] = []
    for rehearsed in (False, True):
        trainer = make_trainer(
            tiny_base, images, tmp_path, spec=AdapterSpec(dropout=0.5), learning_rate=1e-2, preservation_weight=1.0
        )
        if rehearsed:
            assert trainer.rehearse() > 0.0
            assert trainer.position.step == 0 and all(parameter.grad is None for parameter in trainer.parameters)
        list(trainer.events())
        ends.append(torch.cat([parameter.flatten() for parameter in trainer.parameters]))
    assert torch.equal(*ends)


def test_preservation_keeps_answers_to_class_words(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    moved: list[float] = []
    for weight in (1e-6, 10.0):
        trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=2e-2, preservation_weight=weight)
        list(trainer.events())
        latents, noise = trainer._latents_and_noise([Exposure(i, 1) for i in range(5)], trainer.data)
        batch = Batch(latents, noise, torch.full((5,), 500), trainer.data.text([(i, 1) for i in range(5)]))
        class_text = trainer.data.prior_text([(i, 1) for i in range(5)])
        with torch.no_grad():
            distance = diffusion_loss_with_prior(
                trainer.base, trainer.adapter, batch, torch.arange(5), class_text, class_text
            )[1]
        moved.append(distance.mean().item())
    assert moved[1] < 0.8 * moved[0]


def test_what_is_prior_at_some_exposures_has_the_gradient_of_all_on_average(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, preservation_weight=2.0, preservation_every=3)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    exposures, timesteps = [Exposure(index, 1) for index in range(5)], [30, 250, 430, 610, 950]
    rows = [index for index, _ in enumerate(exposures)]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.parameters)])

    found = []
    for start in range(3):
        trainer.plan = replace(trainer.plan, kept=frozenset(exposures[start::3]))
        with trainer.lean.live():
            found.append(gradient(trainer.losses_per_example(exposures, timesteps)[1].sum()))
    latents, noise = trainer._latents_and_noise(exposures, trainer.data)
    batch = Batch(latents, noise, torch.tensor(timesteps), trainer.data.text([(row, 1) for row in rows]))
    words = trainer.data.prior_text([(row, 1) for row in rows])
    with trainer.lean.live():
        loss, distance = diffusion_loss_with_prior(
            trainer.base, trainer.adapter, batch, torch.tensor(rows), words, words
        )
        whole = gradient((loss + 2.0 * distance).sum())
    torch.testing.assert_close(torch.stack(found).mean(dim=0), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert (found[0] - whole).norm() > 0.01 * whole.norm()


def test_the_base_is_asked_at_the_exposures_that_are_kept_alone(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, preservation_weight=1.0, preservation_every=3)
    asked: list[tuple[int, bool]] = []
    predict = trainer.base.predict

    def count(noisy: torch.Tensor, *others: Any) -> torch.Tensor:
        asked.append((len(noisy), torch.is_grad_enabled()))
        return predict(noisy, *others)

    monkeypatch.setattr(trainer.base, "predict", count)
    list(trainer.events())
    expected: list[tuple[int, bool]] = []
    for (batch,) in trainer.plan.epochs[0]:
        kept = sum(exposure in trainer.plan.kept for exposure in batch)
        expected += [(kept, False)] * (kept > 0) + [(len(batch) + kept, True)]
    assert asked == expected
    assert {size for size, _ in asked} == {1, 2, 3}, "some batches of two keep one exposure, others none"


def test_a_run_that_preserves_at_some_exposures_resumes_in_the_same_bits(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    options = {"preservation_weight": 1.0, "preservation_every": 2, "learning_rate": 1e-2}
    whole, stopped, resumed = (make_trainer(tiny_base, images, tmp_path, **options) for _ in range(3))
    list(whole.events())
    saved = [
        save_checkpoint(tmp_path / "c", stopped, {})
        for event in stopped.events(lambda: stopped.position.step >= 2)
        if isinstance(event, CheckpointDue)
    ]
    load_checkpoint(saved[-1], resumed)
    list(resumed.events())
    assert resumed.position.step == whole.position.step == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))


def test_prior_images_add_the_gradient_of_their_mean_loss(
    tiny_base: Path, images: Path, others: Path, tmp_path: Path
) -> None:
    plain = make_trainer(tiny_base, images, tmp_path, max_grad_norm=0.0)
    kept = load_dataset(Source(others))
    kept = kept.with_buckets(32, 8, buckets=True)
    prior = replace(plain.data, dataset=kept, caption=lambda index, _: kept.examples[index].caption)
    train = plain.config.train.model_copy(update={"preservation_weight": 3.0})
    config = plain.config.model_copy(update={"train": train})
    trainer = Trainer(config, plain.base, plain.adapter, plain.data, Accelerator(cpu=True), prior)
    list(prior.fill("white", trainer.prior_plan.timesteps))
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    found: list[torch.Tensor] = []
    step = trainer.optimizer.step

    def spy() -> None:
        found.extend(p.grad.clone() for p in trainer.parameters if p.grad is not None and len(found) < len(before))
        step()

    trainer.optimizer.step = spy
    first = next(event for event in trainer.events() if isinstance(event, StepDone))
    with torch.no_grad():
        for parameter, value in zip(trainer.parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    (batch,), (beside,) = trainer.plan.epochs[0][0], trainer.prior_plan.epochs[0][0]
    assert [trainer.data.name(exposure.example) for exposure in batch] == first.examples
    with trainer.lean.live():
        loss = trainer.losses_per_example(batch, [trainer.plan.timesteps[v] for v in batch])[0].mean()
        other = trainer.losses_per_example(beside, [trainer.prior_plan.timesteps[v] for v in beside], prior)[0]
        (loss + 3.0 * other.mean()).backward()
    for parameter, gradient in zip(trainer.parameters, found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-8)


def test_what_is_minimised_is_the_weighted_loss(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, loss={"weighting": "min_snr", "gamma": 2.0})
    with torch.no_grad():
        loss, objective = trainer.losses_per_example([Exposure(3, 2), Exposure(2, 1)], [20, 600])
    alphas_cumprod = trainer.base.alphas_cumprod[[20, 600]].double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    torch.testing.assert_close(objective, (snr.clamp(max=2.0) / snr).float() * loss)


def test_hidden_parts_count_as_much_as_the_floor(tiny_base: Path, images: Path, tmp_path: Path) -> None:
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
        found = trainer.losses_per_example(exposures, [600, 600])[0]
        latents, noise = trainer._latents_and_noise(exposures, trainer.data)
        alpha = base.alphas_cumprod[600]
        text = trainer.data.text([(0, 1), (1, 1)])
        answer = base.predict(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, torch.tensor([600, 600]), text)
        whole = plain.losses_per_example(exposures, [600, 600])[0]
    errors = (answer - noise).pow(2)
    expected = (errors[0] * weights).sum() / (4 * weights.sum())
    torch.testing.assert_close(found, torch.stack([expected, errors[1].mean()]))
    torch.testing.assert_close(whole, errors.mean(dim=(1, 2, 3)))


def test_a_changed_mask_is_another_image(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(images, folder)
    found = [make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.5}).data.identities()]
    for width in (8, 16):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, width, 32))
        mask.save(folder / "blue-mask.png")
        found.append(make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.5}).data.identities())
    assert len({identities["blue.png"] for identities in found}) == 3
    assert len({identities["red.png"] for identities in found}) == 1


def test_noise_offset_shifts_whole_channels(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    plain, shifted = (
        trainer._latents_and_noise([Exposure(3, 2)], trainer.data)
        for trainer in (make_trainer(tiny_base, images, tmp_path, loss=loss) for loss in ({}, {"noise_offset": 0.1}))
    )
    assert torch.equal(plain[0], shifted[0])
    name = "purple.png"
    expected = 0.1 * seeds.normal((4, 1, 1), 0, "noise offset", name, 2)
    torch.testing.assert_close(shifted[1][0] - plain[1][0], expected.expand(4, 8, 8), atol=1e-6, rtol=0)


def test_exposures_are_trained_where_coverage_and_density_put_them(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    options = {"coverage": "image", "density": "cubic_low", "max": 899}
    trainer = make_trainer(tiny_base, images, tmp_path, timesteps=options)
    steps = [event for event in trainer.events() if isinstance(event, StepDone)]
    exposures = [list(zip(step.examples, step.exposures, strict=True)) for step in steps]
    density = Density("cubic_low", maximum=899)
    expected = [[density.timestep(draw) for draw in step] for step in cover("image", exposures, 0)]
    assert [step.timesteps for step in steps] == expected


def test_accumulation_gives_the_gradient_of_the_large_batch(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "learning_rate": 1e-2}
    large = make_trainer(tiny_base, images, tmp_path, **options | {"batch_size": 4})
    small = make_trainer(tiny_base, images, tmp_path, **options | {"batch_size": 2, "gradient_accumulation_steps": 2})
    kept: list[list[torch.Tensor]] = []
    for trainer in (large, small):
        grads: list[torch.Tensor] = []
        step = trainer.optimizer.step

        def spy(step=step, trainer=trainer, grads=grads):  # type: ignore[no-untyped-def]
            if not grads:
                grads += trainer.lean.by_layer([p.grad.clone() for p in trainer.parameters if p.grad is not None])
            return step()

        trainer.optimizer.step = spy
        list(trainer.events())
        kept.append(grads)
    assert len(kept[0]) == 32
    for ours, other in zip(*kept, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-8)


def test_clipping_clips(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    for limit in (0.0, 1e-3):
        trainer = make_trainer(tiny_base, images, tmp_path, max_grad_norm=limit)
        norms: list[float] = []
        step = trainer.optimizer.step

        def spy(step=step, trainer=trainer, norms=norms):  # type: ignore[no-untyped-def]
            norms.append(float(torch.stack([p.grad.norm() for p in trainer.parameters]).norm()))
            return step()

        trainer.optimizer.step = spy
        list(trainer.events())
        assert max(norms) > 2e-3 if limit == 0.0 else max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_bf16_moves_every_number_of_a_float32_adapter(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, dtype=torch.bfloat16, learning_rate=1e-4)
    before = copy.deepcopy([p.detach().clone() for p in trainer.adapter.down_parameters()])
    list(trainer.events())
    for old, new in zip(before, trainer.adapter.down_parameters(), strict=True):
        assert new.dtype == torch.float32
        assert (old != new).float().mean() > 0.99


def test_a_loss_that_is_no_number_stops_training(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, log_every_steps=1)
    with torch.no_grad():
        trainer.adapter.up_parameters()[0].fill_(float("nan"))
    with pytest.raises(DivergedError, match="at step 1") as caught:
        list(trainer.events())
    assert caught.value.exit_code == 5


def test_learning_lowers_the_loss_on_what_is_learned(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=2e-2)
    exposures = [Exposure(index, 1) for index in range(5)]
    with torch.no_grad():
        before = trainer.losses_per_example(exposures, [500] * 5)[0].mean()
    assert sum(isinstance(event, StepDone) for event in trainer.events()) == 5
    with torch.no_grad():
        assert trainer.losses_per_example(exposures, [500] * 5)[0].mean() < before
