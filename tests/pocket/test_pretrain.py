"""The base's own training, for a handful of steps: it can be cut, and its result loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdlora.pocket import pretrain, stages
from sdlora.pocket.stages import Settings


def settings(folder: Path, steps: int) -> Settings:
    return Settings(
        work=folder, device="cpu", vae_steps=2, decoder_steps=2, steps=steps, num_images=8, batch_size=2,
        learning_rate=1e-3,
    )  # fmt: skip


def test_interrupted_pretraining_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_EVERY_STEPS", 1)
    whole = settings(tmp_path / "whole", 2)
    whole.work.mkdir()
    pretrain.train_unet(whole, pretrain.autoencoder(whole).train())
    cut = settings(tmp_path / "cut", 2)
    cut.work.mkdir()
    vae = pretrain.autoencoder(cut).train()
    save = stages.save

    def save_and_fail(path: Path, state: dict[str, object]) -> None:
        save(path, state)
        if path.name == "unet_checkpoint.pt" and state["step"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "save", save_and_fail)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_unet(cut, vae)
    monkeypatch.setattr(stages, "save", save)
    pretrain.train_unet(cut, vae)
    states = [torch.load(p.work / "unet_checkpoint.pt", weights_only=True)["unet"] for p in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    finished = pretrain.autoencoder(cut).finish_decoder(vae)
    encoders = [torch.load(path, weights_only=True) for path in (vae, finished)]
    assert all(torch.equal(encoders[0][n], encoders[1][n]) for n in encoders[0] if n.startswith("encoder."))
    assert not torch.equal(*(encoder["decoder.conv_out.weight"] for encoder in encoders))
    pretrain.export_pocket(cut, finished, cut.work / "pocket")
    pipeline = StableDiffusionPipeline.from_pretrained(cut.work / "pocket", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red cat", num_inference_steps=2).images[0].size == (64, 64)


def test_learning_rate_rises_stays_and_falls() -> None:
    scales = [stages.learning_rate_scale(step, 1000) for step in range(1000)]
    assert scales[0] == 0.01
    assert scales[99] == scales[600] == 1.0
    assert scales[999] == 0.01
    assert scales[850] == pytest.approx(0.5)
