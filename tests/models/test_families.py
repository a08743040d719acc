"""Every family against diffusers' own pipeline, in all layouts that a base comes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.ldm import authors_layout, write_checkpoint
from helpers.tiny import TINY, make_tiny, tiny_networks

from sdlora.data.dataset import Example
from sdlora.errors import ConfigError
from sdlora.models.architectures import Family
from sdlora.models.base import BaseModel
from sdlora.models.detect import recognise
from sdlora.models.load import LoadOptions, load_base
from sdlora.models.safetensors_header import read_header
from sdlora.models.text import TextOptions

CPU = torch.device("cpu")
FAMILIES: list[Family] = ["sd1", "sd2", "sdxl"]
NAMES = {
    "sd1": ("stable-diffusion-v1", "epsilon"),
    "sd2": ("stable-diffusion-v2-768-v", "v_prediction"),
    "sdxl": ("stable-diffusion-xl-v1-base", "epsilon"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


def load(path: Path, **options: Any) -> BaseModel:
    return load_base(str(path), device=CPU, dtype=torch.float32, options=LoadOptions(**options))


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


CAPTIONS = ["a cat", "zumi by the sea"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captions_and_answers_equal_those_of_diffusers(family: Family, folders: dict[Family, Path]) -> None:
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
    more = base.image_states(examples)
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


def test_sizes_matter_to_sdxl(folders: dict[Family, Path]) -> None:
    base = load(folders["sdxl"])
    noise, text = torch.randn(1, 4, 8, 8), base.encode_captions(["a cat"])
    answers = [
        base.predict(
            noise,
            torch.tensor([500]),
            text | base.image_states([Example("a", Path("a"), "", sizes[0], size_px=sizes[1])]),
        )
        for sizes in (((32, 32), (32, 32)), ((32, 32), (900, 500)))
    ]
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_are_diffusers_own_from_the_same_prompts(family: Family, folders: dict[Family, Path]) -> None:
    base, pipeline = load(folders[family]), reference(family, folders[family])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    expected = pipeline(["a cat"], negative_prompt=["blue"], generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        prompts = base.preview_prompts(["a cat"], ["blue"])
    with base.pipeline() as own, torch.no_grad():
        found = own(**prompts, generator=torch.Generator().manual_seed(0), **options)
    assert abs(found.images - expected.images).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_unet_computes_in_less_than_float32(dtype: torch.dtype, folders: dict[Family, Path]) -> None:
    base: Any = load_base(str(folders["sdxl"]), device=CPU, dtype=dtype)
    assert base.unet.dtype == dtype
    assert {network.dtype for network in (base.vae, *base.text_encoders)} == {torch.float32}
    # The published VAE overflows in float16; here its numbers are made as large.
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.mul_(1e6)
    assert bool(base.encode_pixels(torch.ones(1, 3, 32, 32)).isfinite().all())


def test_sizes_stay_exact_where_the_unet_computes_in_bf16(folders: dict[Family, Path]) -> None:
    base = load_base(str(folders["sdxl"]), device=CPU, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    base.unet.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        prompts = base.preview_prompts(["a cat"], [""])
    with base.pipeline() as pipeline, torch.no_grad():
        pipeline(**prompts, num_inference_steps=1, original_size=(1023, 1025), output_type="latent")
    example = Example("a", Path("a"), "", (32, 32), size_px=(1023, 1025))
    text = base.encode_captions(["a cat"]) | base.image_states([example])
    base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), text)
    assert [tensor[0, :2].tolist() for tensor in seen] == [[1023.0, 1025.0], [1025.0, 1023.0]]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sd1", torch.float16), ("sd2", torch.bfloat16), ("sdxl", torch.float16)],
)
def test_a_checkpoint_in_one_file_has_the_same_weights(
    family: Family, dtype: torch.dtype, tmp_path: Path, small: None
) -> None:
    networks = tiny_networks(family)
    file = tmp_path / "whatever.safetensors"
    write_checkpoint(file, authors_layout(family, networks), dtype=dtype)
    base = load(file, prediction_type="v_prediction" if family == "sd2" else None)
    assert (base.architecture, base.prediction_type) == NAMES[family]
    own = {"unet": base.unet, "vae": base.vae} | dict(  # type: ignore[attr-defined]
        zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=False)
    )
    assert own.keys() == networks.keys()
    for name, network in networks.items():
        expected, found = network.state_dict(), own[name].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key].to(dtype).float()) for key in expected)
    assert base.encode_captions(["a cat"])["states"].shape == (1, 77, TINY[family].text_width)
    with torch.no_grad():
        prompts = base.preview_prompts(["a cat"], [""])
    with base.pipeline() as pipeline, torch.no_grad():
        pipeline(**prompts, num_inference_steps=1, output_type="latent")


def test_what_a_file_in_one_predicts(tmp_path: Path, small: None) -> None:
    layouts = {family: authors_layout(family, tiny_networks(family)) for family in ("sd2", "sdxl")}
    file = tmp_path / "base.safetensors"

    def found(family: Family, metadata: dict[str, str] | None = None, **more: torch.Tensor) -> tuple[str | None, bool]:
        write_checkpoint(file, layouts[family] | more, metadata=metadata)
        recognised = recognise(read_header(file), "base")
        return recognised.prediction_type, recognised.ends_in_noise

    assert found("sd2") == (None, False)
    assert found("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}) == ("v_prediction", False)
    assert found("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}) == ("epsilon", False)
    assert found("sd2", {"modelspec.prediction_type": "epsilon"}) == ("epsilon", False)
    # 64 latents of 4 px each here, of 8 px each at the true shapes.
    assert load(file).resolution_px == 256
    assert found("sdxl") == ("epsilon", False)
    assert found("sdxl", v_pred=torch.zeros(1)) == ("v_prediction", False)
    assert found("sdxl", v_pred=torch.zeros(1), ztsnr=torch.zeros(1)) == ("v_prediction", True)
    base = load(file)
    assert (base.prediction_type, float(base.alphas_cumprod[-1])) == ("v_prediction", 0.0)
    assert load(file, prediction_type="epsilon").prediction_type == "epsilon"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_long_captions_are_read_in_windows(family: Family, folders: dict[Family, Path]) -> None:
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
def test_clip_skip_reads_an_earlier_layer_through_the_last_norm(folders: dict[Family, Path]) -> None:
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


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_layer_but_one_is_no_choice(family: Family, folders: dict[Family, Path]) -> None:
    assert torch.equal(
        load(folders[family], text=TextOptions(clip_skip=2)).encode_captions(CAPTIONS)["states"],
        load(folders[family]).encode_captions(CAPTIONS)["states"],
    )
    with pytest.raises(ConfigError, match=r"clip_skip is 1"):
        load(folders[family], text=TextOptions(clip_skip=1))
    with pytest.raises(ConfigError, match=r"clip_skip is 3.* 2 layers"):
        load(folders["sd1"], text=TextOptions(clip_skip=3))
