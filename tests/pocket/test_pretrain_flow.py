"""Pocket-flow's own training, for a handful of steps: its fast form is diffusers' class, and its result loads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ZImagePipeline

from sdlora.pocket import flow_architecture, pretrain_flow


def test_fast_transformer_computes_as_diffusers_class_does() -> None:
    torch.manual_seed(0)
    network, tokenizer = flow_architecture.build_transformer().eval(), flow_architecture.build_tokenizer()
    encoder = flow_architecture.build_text_encoder(tokenizer).eval()
    captions = ["a red cat", "a big blue star named qwertzuiop on the left, in the snow, in the snow, at night", ""]
    latents, told = [torch.randn(16, 1, 16, 16) for _ in captions], torch.rand(len(captions))
    with torch.no_grad():
        states = pretrain_flow.encode(tokenizer, encoder, captions, "cpu")
        expected = torch.stack(network(latents, told, states, return_dict=False)[0])
        pretrain_flow.make_fast(network, compiled=False)
        found = torch.stack(network(latents, told, states, return_dict=False)[0])
    assert len({len(own) for own in states}) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_captions_are_encoded_as_the_pipeline_encodes_them() -> None:
    tokenizer = flow_architecture.build_tokenizer()
    encoder = flow_architecture.build_text_encoder(tokenizer).eval()
    pipeline = ZImagePipeline(flow_architecture.build_scheduler(), None, encoder, tokenizer, None)  # type: ignore[arg-type]
    captions = ["a red cat in the snow", "a zumi"]
    with torch.no_grad():
        expected = pipeline.encode_prompt(list(captions), "cpu", do_classifier_free_guidance=False)[0]
        found = pretrain_flow.encode(tokenizer, encoder, captions, "cpu")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_words_of_the_world_are_one_token_each() -> None:
    tokenizer = flow_architecture.build_tokenizer()
    assert tokenizer.tokenize("a big red star by the sea, zq") == [
        "a", "Ġbig", "Ġred", "Ġstar", "Ġby", "Ġthe", "Ġsea", ",", "Ġ", "z", "q",
    ]  # fmt: skip


def test_levels_are_spread_and_mostly_at_high_noise() -> None:
    found = pretrain_flow.levels(4000, torch.Generator().manual_seed(0))
    assert found.min() > 0 and found.max() < 1
    # A quarter uniform, the rest of logit-normal quantiles, whose median is shift / (1 + shift).
    assert abs((found < 2 / 3).float().mean() - (0.75 * 0.5 + 0.25 * 2 / 3)) < 0.02


def test_a_few_steps_of_pretraining_give_a_pipeline(tmp_path: Path) -> None:
    settings = pretrain_flow.FlowSettings(
        work=tmp_path, vae_steps=1, decoder_steps=1, steps=1, num_images=4, batch_size=2
    )
    maker = pretrain_flow.autoencoder(settings)
    file = maker.train()
    pretrain_flow.train_transformer(settings, file, compiled=False)
    pretrain_flow.export_pocket_flow(settings, maker.finish_decoder(file), tmp_path / "base")
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "base")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red cat", num_inference_steps=2, guidance_scale=0.0, height=128, width=128).images[0]
    assert image.size == (128, 128)
