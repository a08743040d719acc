"""Every family against diffusers' own pipeline, in all layouts that a base comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.bases import CAPTIONS, CPU, FAMILIES, NAMES, load
from helpers.tiny import TINY, small_tokenizer

from sdlora.common.families import Family
from sdlora.data.dataset import Example
from sdlora.models.base import TextOptions, references_to_other_files
from sdlora.models.load import load_base
from sdlora.models.unet import clip_tokenizer, tokens_in_windows

# From the documentation and examples of CLIP and Stable Diffusion.
KNOWN = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of an astronaut riding a horse on mars": [
        49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407,
    ],
    "hello world!": [49406, 3306, 1002, 256, 49407],
}  # fmt: skip


def reference(family: Family, folder: Path) -> Any:
    return getattr(diffusers, TINY[family].pipeline).from_pretrained(folder)


def encoded(pipeline: Any, captions: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """What diffusers itself gives a UNet of captions."""
    if hasattr(pipeline, "text_encoder_2"):
        states, _, pooled, _ = pipeline.encode_prompt(
            captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **options
        )
        return {"states": states, "pooled": pooled}
    return {"states": pipeline.encode_prompt(captions, "cpu", 1, False, **options)[0]}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_and_predictions_equal_those_of_diffusers(family: Family, folders: dict[Family, Path]) -> None:
    base, pipeline = load(folders[family]), reference(family, folders[family])
    assert (base.architecture, base.prediction_type) == NAMES[family]
    assert (base.resolution_px, base.latent_factor, base.max_tokens) == (32, 4, 77)
    expected = encoded(pipeline, CAPTIONS)
    found = base.encode_captions(CAPTIONS)
    assert found.keys() == expected.keys()
    for name, states in expected.items():
        torch.testing.assert_close(found[name], states)
    examples = [
        Example("a", Path("a"), "", bucket=(32, 48), size_px=(200, 400)),
        Example("b", Path("b"), "", bucket=(32, 32), size_px=(96, 64)),
    ]
    more = base.size_conditions(examples)
    added = {}
    if family == "sdxl":
        # 200 x 400 is scaled to 32 x 64, and 8 rows are cut off above; 96 x 64 to 48 x 32, and 8 columns at the left.
        # diffusers' own order: original size, top left of the crop, target size, each height or top first.
        rows = [[*(400, 200), *(8, 0), *(48, 32)], [*(64, 96), *(0, 8), *(32, 32)]]
        sizes = [
            pipeline._get_add_time_ids(r[:2], r[2:4], r[4:], torch.float32, text_encoder_projection_dim=24)[0]
            for r in rows
        ]
        assert torch.equal(more["sizes"], torch.stack(sizes))
        added = {"added_cond_kwargs": {"text_embeds": expected["pooled"], "time_ids": more["sizes"]}}
    noise, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 900])
    answer = pipeline.unet(noise, timesteps, expected["states"], **added).sample
    torch.testing.assert_close(base.predict(noise, timesteps, found | more), answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_equal_those_of_diffusers(family: Family, folders: dict[Family, Path]) -> None:
    base, pipeline = load(folders[family]), reference(family, folders[family])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    expected = pipeline(["a cat"], negative_prompt=["blue"], generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        prompts = base.prompt_embeddings(["a cat"], ["blue"])
    with base.pipeline() as own, torch.no_grad():
        found = own(**prompts, generator=torch.Generator().manual_seed(0), **options)
    assert abs(found.images - expected.images).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_unet_is_cast_to_half_precision(dtype: torch.dtype, folders: dict[Family, Path]) -> None:
    base: Any = load_base(str(folders["sdxl"]), device=CPU, dtype=dtype)
    assert base.network.dtype == dtype
    assert {network.dtype for network in (base.vae, *base.text_encoders)} == {torch.float32}
    # The published VAE overflows in float16; here its numbers are made as large.
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.mul_(1e6)
    assert bool(base.encode_pixels(torch.ones(1, 3, 32, 32)).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_long_captions_are_encoded_in_windows(family: Family, folders: dict[Family, Path]) -> None:
    one, three = load(folders[family]), load(folders[family], text=TextOptions(max_windows=3))
    tokenizer = reference(family, folders[family]).tokenizer
    word = next(w for w in ("sea", "cat", "a") if len(tokenizer(w).input_ids) == 3)
    parts = [" ".join([word] * 75), " ".join(["a"] * 75), word]
    found = three.encode_captions([" ".join(parts), "a cat"])
    assert three.max_tokens == 227
    expected = torch.cat([one.encode_captions([part])["states"] for part in parts], dim=1)
    torch.testing.assert_close(found["states"][:1], expected)
    # Windows that a caption does not need are read as the empty caption.
    short = torch.cat([one.encode_captions([part])["states"] for part in ("a cat", "", "")], dim=1)
    torch.testing.assert_close(found["states"][1:], short)
    if family == "sdxl":
        torch.testing.assert_close(found["pooled"][:1], one.encode_captions([parts[0]])["pooled"])
    assert one.text_identity != three.text_identity


@torch.no_grad()
def test_clip_skip_reads_an_earlier_layer_through_the_final_norm(folders: dict[Family, Path]) -> None:
    base, plain = load(folders["sd1"], text=TextOptions(clip_skip=2)), load(folders["sd1"])
    found = base.encode_captions(CAPTIONS)["states"]
    assert base.text_identity != plain.text_identity
    # The same encoder without its last layer, which is what the setting stands for.
    encoder: Any = plain.text_encoders[0]
    encoder.encoder.layers = encoder.encoder.layers[:-1]
    torch.testing.assert_close(found, plain.encode_captions(CAPTIONS)["states"])
    assert torch.equal(
        load(folders["sd1"], text=TextOptions(clip_skip=1)).encode_captions(CAPTIONS)["states"],
        load(folders["sd1"]).encode_captions(CAPTIONS)["states"],
    )


def test_vocabulary_is_that_of_clip() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer(f"  {text.upper()} ").input_ids == ids
    assert (tokenizer.pad_token_id, clip_tokenizer("!").pad_token_id) == (49407, 0)


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_single_window_equals_the_tokenizers_output(padding: str) -> None:
    tokenizer = small_tokenizer(padding)
    captions = ["", "a cat", "zumi " * 200]
    expected = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens_in_windows(tokenizer, captions, 1)[:, 0], expected)


def test_windows_are_consecutive_and_the_rest_is_cut_off() -> None:
    tokenizer = small_tokenizer("<|endoftext|>")
    ids = tokenizer("zumi the cat by the sea " * 60, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) > 225
    windows = tokens_in_windows(tokenizer, ["zumi the cat by the sea " * 60], 3)[0]
    assert windows.shape == (3, 77)
    assert windows[:, 1:76].flatten().tolist() == ids[:225]
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert windows[:, 76].tolist() == [tokenizer.eos_token_id] * 3


def test_references_to_other_files_are_found() -> None:
    assert references_to_other_files("a cat, embedding:zumi, <lora:hero:0.8>") == ["embedding:zumi,", "<lora:hero:0.8>"]
    assert references_to_other_files("a <zumi> with embedding on the lora farm") == []
