from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from helpers.tiny import make_tiny_pipeline

from sdlora.models.identity import weights_identity
from sdlora.models.load import load_base

CPU = torch.device("cpu")


def test_tensors_equal_those_of_diffusers_modules(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=CPU, dtype=torch.float32)
    reference = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = reference.vae.encode(pixels).latent_dist
        moments = base.encode_pixels(pixels)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        expected = posterior.sample(torch.Generator().manual_seed(7)) * reference.vae.config.scaling_factor
        torch.testing.assert_close(base.sample_latents(moments, noise), expected)
        states, _ = reference.encode_prompt(["a cat", "a dog"], "cpu", 1, False)
        found = base.encode_captions(["a cat", "a dog"])
        torch.testing.assert_close(found["states"], states)
        timesteps = torch.tensor([3, 900])
        answer = reference.unet(noise, timesteps, states).sample
        torch.testing.assert_close(base.predict(noise, timesteps, found), answer)
    assert (base.resolution_px, base.latent_factor, base.prediction_type) == (32, 4, "epsilon")
    assert base.num_tokens("a cat") == 4


def test_previews_work_in_bf16_with_latents_in_fp32(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=CPU, dtype=torch.bfloat16)
    prompts = base.prompt_embeddings(["a cat"], [""])
    with base.pipeline() as pipeline:
        options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
        latents = pipeline(**prompts, generator=torch.Generator().manual_seed(0), **options).images
    assert latents.dtype == torch.float32
    assert not list(base.network._forward_hooks.values())
    assert next(base.network.parameters()).dtype == torch.bfloat16
    assert next(base.fresh_pipeline().unet.parameters()).dtype == torch.float32


def test_v_prediction_is_read_from_the_scheduler(tmp_path: Path) -> None:
    make_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    assert load_base(str(tmp_path / "v"), device=CPU, dtype=torch.float32).prediction_type == "v_prediction"


def test_identity_changes_with_any_weight_and_with_the_vocabulary() -> None:
    layer = torch.nn.Linear(3, 3)
    first = weights_identity(layer, {"a": 1})
    assert first == weights_identity(layer, {"a": 1})
    assert first != weights_identity(layer, {"a": 2})
    with torch.no_grad():
        layer.weight[0, 0] += 1e-6
    assert first != weights_identity(layer, {"a": 1})
