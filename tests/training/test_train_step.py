"""One optimizer step: accumulation, clipping, precision."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer

from sdlora.errors import DivergedError
from sdlora.training.train_step import DivergenceCheck, check_finite


def test_accumulated_gradient_equals_that_of_the_large_batch(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    options = {"max_grad_norm": 0.0, "learning_rate": 1e-2}
    large = make_trainer(tiny_base, images, tmp_path, **options | {"batch_size": 4})
    small = make_trainer(tiny_base, images, tmp_path, **options | {"batch_size": 2, "gradient_accumulation_steps": 2})
    kept: list[list[torch.Tensor]] = []
    for trainer in (large, small):
        grads: list[torch.Tensor] = []
        step = trainer.step.optimizer.step

        def spy(step=step, trainer=trainer, grads=grads):  # type: ignore[no-untyped-def]
            if not grads:
                grads += trainer.step.model.by_layer(
                    [p.grad.clone() for p in trainer.step.parameters if p.grad is not None]
                )
            return step()

        trainer.step.optimizer.step = spy
        list(trainer.events())
        kept.append(grads)
    assert len(kept[0]) == 32
    for ours, other in zip(*kept, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-8)


def test_gradient_norm_is_clipped_to_the_limit(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    for limit in (0.0, 1e-3):
        trainer = make_trainer(tiny_base, images, tmp_path, max_grad_norm=limit)
        norms: list[float] = []
        step = trainer.step.optimizer.step

        def spy(step=step, trainer=trainer, norms=norms):  # type: ignore[no-untyped-def]
            norms.append(float(torch.stack([p.grad.norm() for p in trainer.step.parameters]).norm()))
            return step()

        trainer.step.optimizer.step = spy
        list(trainer.events())
        assert max(norms) > 2e-3 if limit == 0.0 else max(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "adafactor"])
def test_text_encoder_stays_as_it_is_after_its_epochs(
    optimizer: str, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    targets = ("cross_attention", "text_encoder")
    options = {"targets": targets, "learning_rate": 1e-2, "optimizer": optimizer, "timesteps": {"coverage": "none"}}
    trainer = make_trainer(tiny_base, images, tmp_path, **options, epochs=2, text_encoder_epochs=1)  # type: ignore[arg-type]
    first = make_trainer(tiny_base, images, tmp_path, **options)  # type: ignore[arg-type]
    list(first.events())
    list(trainer.events())
    for path, layer in trainer.adapter.layers.items():
        after_one = first.adapter.layers[path]
        same = torch.equal(layer.up, after_one.up) and torch.equal(layer.down, after_one.down)
        assert same is path.startswith("text_encoder"), path


def test_bf16_base_moves_every_element_of_a_float32_adapter(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, dtype=torch.bfloat16, learning_rate=1e-4)
    before = copy.deepcopy([p.detach().clone() for p in trainer.adapter.down_parameters()])
    list(trainer.events())
    for old, new in zip(before, trainer.adapter.down_parameters(), strict=True):
        assert new.dtype == torch.float32
        assert (old != new).float().mean() > 0.99


def test_divergence_on_a_cpu_is_raised_at_once() -> None:
    check = DivergenceCheck()
    check.observe(1, 0.1, torch.ones(2), torch.tensor(3.0))
    with pytest.raises(DivergedError, match=r"loss became nan at step 2 \(learning rate 0\.1\)"):
        check.observe(2, 0.1, torch.tensor([1.0, float("nan")]), torch.tensor(3.0))
    check.observe(3, 0.1, torch.ones(2), torch.tensor(3.0))  # raised once only
    with pytest.raises(DivergedError, match="gradient became inf at step 4"):
        check.observe(4, 0.1, torch.ones(2), torch.tensor(float("inf")))


def test_gradients_under_loss_scaling_are_not_checked() -> None:
    check = DivergenceCheck()
    check.observe(1, 0.1, torch.ones(2), None)
    check.check_pending()


def test_divergence_of_saved_tensors_names_them() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("-inf")])
    check_finite({"adapter": [good], "optimizer": []}, 5)
    with pytest.raises(DivergedError, match="optimizer holds NaN or infinite values after step 5"):
        check_finite({"adapter": [good], "optimizer": [good, bad]}, 5)
