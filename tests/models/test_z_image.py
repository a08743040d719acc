"""Z-Image: what is trained and drawn equals diffusers' classes with PEFT, and what it cannot do is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.normalization import RMSNorm
from helpers.command import call
from helpers.tiny import make_tiny_z_image
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.config.toml import parse_config
from sdlora.diffusion.flow import level
from sdlora.errors import BaseModelError, ConfigError, DataError, SdloraError
from sdlora.lora.inject import Adapter, find_targets, inject
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import describe_lora, read_file
from sdlora.models.base import TextOptions
from sdlora.models.load import LoadOptions, load_base
from sdlora.models.z_image import ZImage, velocity
from sdlora.previews.sampler import PreviewRequest, SamplerWatch, draw
from sdlora.run.arguments import make_adapter, training_settings
from sdlora.training.loss import Batch, diffusion_loss

CPU = torch.device("cpu")
CAPTIONS = ["a zumi", "a red cat by the sea named qwertz, and more words than the others have", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("z-image")
    make_tiny_z_image(place)
    return place


def loaded(folder: Path, **options: Any) -> ZImage:
    base = load_base(str(folder), device=CPU, dtype=torch.float32, options=LoadOptions(**options))
    assert isinstance(base, ZImage)
    return base


def with_lora(base: ZImage) -> Adapter:
    """An adapter whose B is not zero."""
    paths = find_targets(base.network, ["attention", "mlp"])
    adapter = inject(base.network, paths, 4, 2.0, seed=0)
    draw = torch.Generator().manual_seed(1)
    for layer in adapter.layers.values():
        layer.up.data.normal_(std=0.1, generator=draw)
    return adapter


def drawn(num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(num, 16, 8, 6, generator=draw) for _ in range(2))
    return latents, noise, torch.tensor([3, 500, 999])[:num]


def peft_twin(folder: Path, adapter: Adapter) -> ZImageTransformer2DModel:
    """diffusers' transformer with the same adapter in PEFT, float64."""
    twin = ZImageTransformer2DModel.from_pretrained(folder, subfolder="transformer").requires_grad_(False).double()
    twin.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(adapter.layers)))
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.down.detach().double()
        theirs.lora_B["default"].weight.data = layer.up.detach().double()
    return twin


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' class compute in float64 where it goes to float32: rotations and norms."""

    def norm(module: RMSNorm, x: Tensor) -> Tensor:
        normal: Tensor = x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight
        return normal

    plain = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else plain(x))
    monkeypatch.setattr(RMSNorm, "forward", norm)


def test_loss_and_gradients_equal_those_of_peft_in_float64(folder: Path, in_float64: None) -> None:
    base = loaded(folder)
    adapter = with_lora(base)
    twin = peft_twin(folder, adapter)
    latents, noise, timesteps = drawn()
    with torch.no_grad():
        states = [
            own[: int(mask.sum())].double() for own, mask in zip(*base.encode_captions(CAPTIONS).values(), strict=True)
        ]
    base.network.double()
    for layer in adapter.layers.values():
        layer.double()
    x, e, s = latents.double(), noise.double(), ((timesteps + 1).double() / 1000).view(-1, 1, 1, 1)
    ours = (
        (velocity(base.network, base.levels.mix(x, e, timesteps), level(timesteps), states) - (e - x)).square().mean()
    )
    ours.backward()
    # As the training script of diffusers has it: the model is told 1 - s and predicts x0 - e.
    output = twin(list(((1 - s) * x + s * e).unsqueeze(2)), 1 - s.flatten(), states, return_dict=False)[0]
    theirs = (-torch.stack(output).squeeze(2) - (e - x)).square().mean()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    for path, layer in adapter.layers.items():
        for mine, other in ((layer.down, "lora_A"), (layer.up, "lora_B")):
            expected = getattr(twin.get_submodule(path), other)["default"].weight.grad
            assert torch.linalg.norm(mine.grad - expected) <= 1e-8 * torch.linalg.norm(expected), path


def test_loss_of_a_batch_is_that_of_each_caption_alone(folder: Path) -> None:
    base = loaded(folder)
    with_lora(base)
    latents, noise, timesteps = drawn()
    with torch.no_grad():
        alone = [base.encode_captions([caption]) for caption in CAPTIONS]
        text = base.batched([{name: value[0] for name, value in own.items()} for own in alone])
        assert len({int(n) for n in text["mask"].sum(dim=1)}) == 3
        together = diffusion_loss(base, Batch(latents, noise, timesteps, text))
        each = [
            diffusion_loss(base, Batch(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1], alone[i]))
            for i in range(3)
        ]
        torch.testing.assert_close(together, torch.cat(each), rtol=1e-6, atol=1e-6)
        # Encoded together, captions have the states that they have alone.
        torch.testing.assert_close(base.encode_captions(CAPTIONS)["mask"], text["mask"])


def test_gradients_are_the_same_with_checkpointing(folder: Path) -> None:
    base = loaded(folder)
    adapter = with_lora(base)
    latents, noise, timesteps = drawn()
    text = {name: value.detach() for name, value in base.encode_captions(CAPTIONS).items()}
    found = []
    for switch in (base.network.disable_gradient_checkpointing, base.network.enable_gradient_checkpointing):
        switch()
        diffusion_loss(base, Batch(latents, noise, timesteps, text)).mean().backward()
        found.append([parameter.grad.clone() for parameter in adapter.parameters()])
        for parameter in adapter.parameters():
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_previews_equal_those_of_the_pipeline(folder: Path, guidance: float) -> None:
    base = loaded(folder)
    request = PreviewRequest(("a red cat", "a zumi at night"), (5,), "blurry", 3, guidance, size_px=(48, 32))
    watch = SamplerWatch(base)
    (images,) = draw(base, request, request.wanted(), watch)
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        list(request.prompts), negative_prompt=["blurry"] * 2, num_inference_steps=3, guidance_scale=guidance - 1,
        width=48, height=32, generator=[torch.Generator().manual_seed(5) for _ in range(2)],
    ).images  # fmt: skip
    for ours, theirs in zip(images, expected, strict=True):
        assert ours.size == (48, 32)
        difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(theirs.tobytes()))
        assert difference.abs().max() <= 1
    assert len(watch.guidance_norms) == (0 if guidance == 1.0 else 2)


def test_latents_and_pixels_are_those_of_the_pipeline(folder: Path) -> None:
    base = loaded(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = base.encode_pixels(pixels)
    latents = base.sample_latents(moments, torch.zeros(1, 16, 8, 8))
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, (mode - 0.12) * 0.36)
    with torch.no_grad():
        expected = pipeline.image_processor.postprocess(pipeline.vae.decode(mode, return_dict=False)[0])
    assert base.decode_latents(latents)[0].tobytes() == expected[0].tobytes()


def test_levels_are_drawn_from_the_shifted_density(folder: Path) -> None:
    base = loaded(folder)
    config = parse_config({"data": {"folder": "x"}}, name="x")
    edges = training_settings(config, base).density.edges
    # Logit-normal shifted by 3: its median is 3 / (1 + 3).
    assert edges[750] == pytest.approx(0.5)
    uniform = parse_config({"data": {"folder": "x"}, "timesteps": {"density": "uniform"}}, name="x")
    edges = training_settings(uniform, base).density.edges
    assert edges[200] == pytest.approx(0.077, abs=5e-4)
    assert edges[1000] - edges[800] == pytest.approx(0.429, abs=5e-4)


def refused(folder: Path, document: dict[str, Any]) -> str:
    """What is said of a configuration, which is refused once the base is loaded."""
    config = parse_config({"data": {"folder": "x", "trigger": "zumi"}, **document}, name="x")
    with pytest.raises(ConfigError) as caught:
        base = loaded(folder, text=TextOptions(config.base.clip_skip, config.data.max_token_windows))
        if config.loss.zero_terminal_snr:
            base.use_zero_terminal_snr()
        make_adapter(config, base)
        training_settings(config, base)
    return str(caught.value)


@pytest.mark.parametrize(
    ("document", "option"),
    [
        ({"lora": {"targets": ["attention", "text_encoder"]}}, "text_encoder"),
        ({"lora": {"targets": ["cross_attention"]}}, "attention, mlp"),
        ({"lora": {"targets": ["attention"]}, "timesteps": {"density": "speed"}}, "timesteps.density"),
        ({"loss": {"zero_terminal_snr": True}}, "loss.zero_terminal_snr"),
        ({"base": {"clip_skip": 2}}, "base.clip_skip"),
        ({"data": {"folder": "x", "max_token_windows": 2}}, "data.max_token_windows"),
    ],
)
def test_what_is_for_other_families_is_refused(folder: Path, document: dict[str, Any], option: str) -> None:
    assert option in refused(folder, document)


def test_samplers_of_other_families_are_refused(folder: Path) -> None:
    request = PreviewRequest(("a cat",), (0,), "", 2, 1.0, sampler="euler_a", size_px=(32, 32))
    with pytest.raises(ConfigError, match=r"preview\.sampler"):
        list(draw(loaded(folder), request, request.wanted()))


def change(part: str, **entries: Any) -> Callable[[Path], None]:
    """Change a part's configuration."""

    def edit(folder: Path) -> None:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return edit


def without_text_encoder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("Z-Image-Turbo", lambda _: None, "distilled"),
        ("base", without_text_encoder, "text_encoder"),
        ("base", change("vae", latent_channels=4), ""),
    ],
)
def test_a_base_that_cannot_be_trained_is_refused(
    folder: Path, tmp_path: Path, name: str, edit: Callable[[Path], None], said: str
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / name))
    edit(place)
    with pytest.raises(BaseModelError, match=said):
        loaded(place)


def test_a_vae_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "base"))
    config = json.loads((place / "vae" / "config.json").read_text()) | {"latent_channels": 4}
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(config).save_pretrained(place / "vae")
    with pytest.raises(BaseModelError, match="VAE has 4"):
        loaded(place)


# How trainers write the same adapter: prefix, names of the factors, and whether alpha / r is in B or beside it.
SPELLINGS = {
    "folded": ("diffusion_model.", "lora_A.weight", "lora_B.weight", False),
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", False),
    "alpha beside": ("diffusion_model.", "lora_A.weight", "lora_B.weight", True),
    "down and up": ("diffusion_model.", "lora_down.weight", "lora_up.weight", True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_other_trainers_are_read_at_their_strength(folder: Path, tmp_path: Path, spelling: str) -> None:
    prefix, down, up, beside = SPELLINGS[spelling]
    base = loaded(folder)
    adapter = with_lora(base)
    latents, _, timesteps = drawn()
    with torch.no_grad():
        text = base.encode_captions(CAPTIONS)
        expected = base.predict(latents, timesteps, text)
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        scale = 1.0 if beside else layer.alpha / layer.rank
        tensors[f"{prefix}{path}.{down}"] = layer.down.detach().clone()
        tensors[f"{prefix}{path}.{up}"] = layer.up.detach() * scale
        if beside:
            tensors[f"{prefix}{path}.alpha"] = torch.tensor(layer.alpha)
    save_file(tensors, tmp_path / "other.safetensors")
    adapter.remove()
    file = read_file(tmp_path / "other.safetensors")
    assert describe_lora(tmp_path / "other.safetensors")["family"] == "Z-Image"
    attach(base.network, file)
    with torch.no_grad():
        torch.testing.assert_close(base.predict(latents, timesteps, text), expected, rtol=1e-5, atol=1e-6)


def test_a_file_of_the_authors_fused_layers_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    key = "diffusion_model.layers.0.attention.qkv"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(96, 2)}
    save_file(tensors, tmp_path / "fused.safetensors")
    with pytest.raises(SdloraError, match="qkv"):
        attach(loaded(folder).network, read_file(tmp_path / "fused.safetensors"))


def test_text_states_are_kept_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    from sdlora.cache.tensors import Cache

    cache = Cache(tmp_path, loaded(folder))
    list(cache.fill_text(CAPTIONS))
    kept = [load_file(file) for file in tmp_path.rglob("*.safetensors")]
    assert len(kept) == 3
    assert all(file["states"].dtype == torch.bfloat16 for file in kept)
    assert cache.text(CAPTIONS)["mask"].sum(dim=1).tolist() == [
        float(cache.base.num_tokens(caption)) for caption in CAPTIONS
    ]


def test_files_made_of_others_keep_the_form_that_programs_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = loaded(folder)
    adapter = with_lora(base)
    first, merged = tmp_path / "first.safetensors", tmp_path / "merged.safetensors"
    tensors = {
        f"diffusion_model.{path}.{kind}": tensor.detach().clone()
        for path, layer in adapter.layers.items()
        for kind, tensor in (("lora_A.weight", layer.down), ("lora_B.weight", layer.up * 0.5))
    }
    save_file(tensors, first)
    adapter.remove()
    assert call(capsys, "merge", "--output", str(merged), str(first), str(first), "--weights", "1", "0.5")[0] == 0
    found = load_file(merged)
    assert found.keys() == tensors.keys()
    for key in (key.removesuffix("lora_A.weight") for key in tensors if key.endswith("lora_A.weight")):
        expected = 1.5 * tensors[f"{key}lora_B.weight"] @ tensors[f"{key}lora_A.weight"]
        torch.testing.assert_close(found[f"{key}lora_B.weight"] @ found[f"{key}lora_A.weight"], expected)
    code, _, said = call(capsys, "convert", str(first), str(tmp_path / "kohya.safetensors"), "--to", "kohya")
    assert code == DataError.exit_code and "--to peft" in said
    assert not (tmp_path / "kohya.safetensors").exists()
