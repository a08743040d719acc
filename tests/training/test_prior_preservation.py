"""Prior preservation by class words and by images of a folder, against formulas written out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.schedules import dataset, schedule_settings
from helpers.trainer import make_trainer

from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.data.batches import Exposure
from sdlora.data.dataset import load_dataset
from sdlora.events import CheckpointDue, StepDone
from sdlora.lora.inject import find_targets, inject
from sdlora.models.load import load_base
from sdlora.training.checkpoint import load_checkpoint, save_checkpoint
from sdlora.training.data import make_schedule
from sdlora.training.loss import Batch, diffusion_loss
from sdlora.training.prior_preservation import (
    ClassWords,
    diffusion_loss_with_prior,
    one_in,
    schedule_prior_images,
)
from sdlora.training.trainer import Trainer


def class_words(trainer: Trainer) -> ClassWords:
    extra = trainer.terms[0].loss.extra
    assert isinstance(extra, ClassWords)
    return extra


def test_one_pass_gives_the_loss_and_the_distance_from_the_base_model(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.network, find_targets(base.network, ["cross_attention"]), 2, 2.0, 0)
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=draw)
    batch = Batch(latents, noise, torch.tensor([10, 400, 950]), base.encode_captions(["a", "b", "c"]))
    class_text = base.encode_captions(["cat", "", "dog"])
    with torch.no_grad():
        everyone = torch.arange(3)
        unmoved = diffusion_loss_with_prior(base, adapter, batch, everyone, class_text, class_text)[1]
        assert unmoved.max() < 1e-12, "B is zero, and twice the batch rounds a little differently"
        for parameter in adapter.up_parameters():
            parameter.normal_(generator=draw)
        loss, distance = diffusion_loss_with_prior(base, adapter, batch, everyone, class_text, class_text)
        some = torch.tensor([2, 0])
        their_text = {name: states[some] for name, states in class_text.items()}
        fewer = diffusion_loss_with_prior(base, adapter, batch, some, their_text, their_text)
        alpha = base.levels.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        moved = base.network(noisy, batch.timesteps, class_text["states"]).sample
        adapter.set_strength(0.0)
        kept = base.network(noisy, batch.timesteps, class_text["states"]).sample
        adapter.set_strength(1.0)
    torch.testing.assert_close(distance, (moved - kept).pow(2).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss, diffusion_loss(base, batch))
    torch.testing.assert_close(fewer, (loss, distance[some]))
    assert loss.min() > 0


def test_class_words_keep_predictions_for_the_base_models_own_text(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, targets=("text_encoder",), preservation_weight=1.0)
    with torch.no_grad():
        for parameter in trainer.adapter.up_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        latents, noise = trainer.terms[0].loss.latents_and_noise([Exposure(3, 2)])
        loss, objective = trainer.terms[0].loss([Exposure(3, 2)], [600])
        found = objective - loss
        base, alpha = trainer.base, trainer.base.levels.alphas_cumprod[600]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        moved = base.predict(noisy, torch.tensor([600]), base.encode_captions(["a cat"]))
        trainer.adapter.set_strength(0.0)
        kept = base.predict(noisy, torch.tensor([600]), base.encode_captions(["a cat"]))
    assert found.item() > 0
    torch.testing.assert_close(found, (moved - kept).pow(2).mean().unsqueeze(0), rtol=1e-4, atol=1e-6)


def test_larger_weight_keeps_class_word_predictions_closer(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    moved: list[float] = []
    for weight in (1e-6, 10.0):
        trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=2e-2, preservation_weight=weight)
        list(trainer.events())
        latents, noise = trainer.terms[0].loss.latents_and_noise([Exposure(i, 1) for i in range(5)])
        batch = Batch(latents, noise, torch.full((5,), 500), trainer.data.text([(i, 1) for i in range(5)]))
        class_text = trainer.data.prior_text([(i, 1) for i in range(5)])
        with torch.no_grad():
            distance = diffusion_loss_with_prior(
                trainer.base, trainer.adapter, batch, torch.arange(5), class_text, class_text
            )[1]
        moved.append(distance.mean().item())
    assert moved[1] < 0.8 * moved[0]


def test_gradient_of_some_exposures_equals_that_of_all_on_average(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, preservation_weight=2.0, preservation_every=3)
    with torch.no_grad():
        for parameter in trainer.step.parameters:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    exposures, timesteps = [Exposure(index, 1) for index in range(5)], [30, 250, 430, 610, 950]
    rows = [index for index, _ in enumerate(exposures)]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.step.parameters)])

    found = []
    for start in range(3):
        class_words(trainer).compared = frozenset(exposures[start::3])
        with trainer.step.model.forward_backward():
            found.append(gradient(trainer.terms[0].loss(exposures, timesteps)[1].sum()))
    latents, noise = trainer.terms[0].loss.latents_and_noise(exposures)
    batch = Batch(latents, noise, torch.tensor(timesteps), trainer.data.text([(row, 1) for row in rows]))
    words = trainer.data.prior_text([(row, 1) for row in rows])
    with trainer.step.model.forward_backward():
        loss, distance = diffusion_loss_with_prior(
            trainer.base, trainer.adapter, batch, torch.tensor(rows), words, words
        )
        whole = gradient((loss + 2.0 * distance).sum())
    torch.testing.assert_close(torch.stack(found).mean(dim=0), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert (found[0] - whole).norm() > 0.01 * whole.norm()


def test_base_model_predicts_for_compared_exposures_only(
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
    for (batch,) in trainer.schedule.epochs[0]:
        kept = sum(exposure in class_words(trainer).compared for exposure in batch)
        expected += [(kept, False)] * (kept > 0) + [(len(batch) + kept, True)]
    assert asked == expected
    assert {size for size, _ in asked} == {1, 2, 3}, "some batches of two keep one exposure, others none"


def test_training_with_some_exposures_compared_resumes_bit_for_bit(
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
    assert all(torch.equal(a, b) for a, b in zip(whole.step.parameters, resumed.step.parameters, strict=True))


def test_prior_images_add_the_gradient_of_their_mean_loss(
    tiny_base: Path, images: Path, others: Path, tmp_path: Path
) -> None:
    plain = make_trainer(tiny_base, images, tmp_path, max_grad_norm=0.0)
    kept = load_dataset(ImageFolder(str(others)))
    kept = kept.with_buckets(32, BucketOptions(8))
    prior = replace(plain.data, dataset=kept, caption=lambda index, _: kept.examples[index].caption)
    settings = replace(plain.settings, preservation_weight=3.0)
    trainer = Trainer(settings, plain.adapter, plain.data, Accelerator(cpu=True), prior)
    list(prior.fill("white", trainer.terms[1].schedule.timesteps))
    with torch.no_grad():
        for parameter in trainer.step.parameters:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in trainer.step.parameters]
    found: list[torch.Tensor] = []
    step = trainer.step.optimizer.step

    def spy() -> None:
        found.extend(p.grad.clone() for p in trainer.step.parameters if p.grad is not None and len(found) < len(before))
        step()

    trainer.step.optimizer.step = spy
    first = next(event for event in trainer.events() if isinstance(event, StepDone))
    with torch.no_grad():
        for parameter, value in zip(trainer.step.parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    (batch,), (beside,) = trainer.schedule.epochs[0][0], trainer.terms[1].schedule.epochs[0][0]
    assert [trainer.data.name(exposure.example) for exposure in batch] == first.examples
    with trainer.step.model.forward_backward():
        loss = trainer.terms[0].loss(batch, [trainer.schedule.timesteps[v] for v in batch])[0].mean()
        other = trainer.terms[1].loss(beside, [trainer.terms[1].schedule.timesteps[v] for v in beside])[0]
        (loss + 3.0 * other.mean()).backward()
    for parameter, gradient in zip(trainer.step.parameters, found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("every", "size"), [(1, 4), (2, 4), (2, 1), (3, 4), (4, 4), (5, 3)])
def test_compared_exposures_are_equally_likely_and_spread_over_the_timesteps(every: int, size: int) -> None:
    batches = [tuple(Exposure(place, number) for place in range(size)) for number in range(3000)]
    # The order of timesteps differs from batch to batch.
    timesteps = {v: 200 * ((v.example + v.number) % size) + v.number % 200 for batch in batches for v in batch}
    kept = one_in(every, batches, timesteps, 0)
    for place in range(size):
        share = sum(Exposure(place, number) in kept for number in range(3000)) / 3000
        assert share == pytest.approx(1 / every, abs=0.04)
    for batch in batches:
        ranks = [rank for rank, v in enumerate(sorted(batch, key=lambda v: timesteps[v])) if v in kept]
        assert len(ranks) in (size // every, -(-size // every))
        assert all(after - before == every for before, after in pairwise(ranks))
    assert kept == one_in(every, batches, timesteps, 0)
    assert (kept == one_in(every, batches, timesteps, 1)) == (every == 1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_prior_images_come_in_rounds_beside_every_batch(accumulation: int) -> None:
    settings = schedule_settings(gradient_accumulation_steps=accumulation)
    trained = make_schedule(settings, dataset([3, 4, 3, 4, 3]))
    kept = dataset([1] * 5, "kept")
    schedule = schedule_prior_images(settings, kept, trained)
    assert [[len(step) for step in epoch] for epoch in schedule.epochs] == [
        [len(step) for step in epoch] for epoch in trained.epochs
    ]
    exposures = [exposure for epoch in schedule.epochs for step in epoch for batch in step for exposure in batch]
    counts = Counter(exposure.example for exposure in exposures)
    assert set(counts) == set(range(5))
    # Round by round: no image comes again before all others came.
    assert max(counts.values()) - min(counts.values()) <= 1
    for place, exposure in enumerate(exposures):
        assert exposure.number == Counter(v.example for v in exposures[: place + 1])[exposure.example]
    for epoch in schedule.epochs:
        for batch in (batch for step in epoch for batch in step):
            assert len({kept.examples[exposure.example].bucket for exposure in batch}) == 1
    # Each image's exposures fall into as many slices of the timesteps, one into each.
    for index, count in counts.items():
        found = sorted(schedule.timesteps[exposure] for exposure in exposures if exposure.example == index)
        assert [int(timestep // (1000 / count)) for timestep in found] == list(range(count))
    assert schedule == schedule_prior_images(settings, kept, trained)
    other = replace(settings, seed=1)
    assert schedule.epochs != schedule_prior_images(other, kept, trained).epochs


def test_prior_images_leave_the_training_schedule_unchanged() -> None:
    settings = schedule_settings()
    trained = make_schedule(settings, dataset([2, 2, 2]))
    schedule_prior_images(settings, dataset([1] * 3), trained)
    assert trained == make_schedule(settings, dataset([2, 2, 2]))
