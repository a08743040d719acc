"""Size conditioning of Stable Diffusion XL."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.bases import CPU, load

from sdlora.common.families import Family
from sdlora.data.dataset import Example
from sdlora.models.load import load_base


def test_sizes_change_the_prediction(folders: dict[Family, Path]) -> None:
    base = load(folders["sdxl"])
    noise, text = torch.randn(1, 4, 8, 8), base.encode_captions(["a cat"])
    answers = [
        base.predict(
            noise,
            torch.tensor([500]),
            text | base.size_conditions([Example("a", Path("a"), "", sizes[0], size_px=sizes[1])]),
        )
        for sizes in (((32, 32), (32, 32)), ((32, 32), (900, 500)))
    ]
    assert not torch.equal(answers[0], answers[1])


def test_sizes_stay_exact_under_bf16(folders: dict[Family, Path]) -> None:
    base = load_base(str(folders["sdxl"]), device=CPU, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    base.network.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        prompts = base.prompt_embeddings(["a cat"], [""])
    with base.pipeline() as pipeline, torch.no_grad():
        pipeline(**prompts, num_inference_steps=1, original_size=(1023, 1025), output_type="latent")
    example = Example("a", Path("a"), "", (32, 32), size_px=(1023, 1025))
    text = base.encode_captions(["a cat"]) | base.size_conditions([example])
    base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), text)
    assert [tensor[0, :2].tolist() for tensor in seen] == [[1023.0, 1025.0], [1025.0, 1023.0]]
