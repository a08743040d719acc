"""FLUX.2 klein: what is trained and drawn equals diffusers' classes with PEFT, and other parts are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from helpers.tiny import make_tiny_klein
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlora.cache.tensors import Cache
from sdlora.config.toml import parse_config
from sdlora.data.dataset import Dataset, Example
from sdlora.diffusion.flow import level
from sdlora.diffusion.timesteps import Density
from sdlora.errors import BaseModelError, ConfigError
from sdlora.lora.inject import Adapter, find_targets, inject
from sdlora.models import flow_model
from sdlora.models.base import Source, TextOptions
from sdlora.models.flux2 import Flux2Klein, velocity
from sdlora.models.load import LoadOptions, load_base
from sdlora.previews.sampler import PreviewRequest, SamplerWatch, draw
from sdlora.run.arguments import make_adapter, training_settings
from sdlora.training.data import make_schedule
from sdlora.training.loss import Batch, diffusion_loss

CPU = torch.device("cpu")
CAPTIONS = ["a zumi", "a red cat by the sea named qwertz, and more words than the others have", ""]
# Fewer padding tokens than klein's 512, and more than the longest caption: most tests are about the other ones.
SHORT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("klein")
    make_tiny_klein(place)
    return place


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_model, "MAX_TOKENS", SHORT)


def pipeline_of(folder: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def loaded(folder: Path, **options: Any) -> Flux2Klein:
    base = load_base(str(folder), device=CPU, dtype=torch.float32, options=LoadOptions(**options))
    assert type(base) is Flux2Klein
    return base


def with_lora(base: Flux2Klein) -> Adapter:
    """An adapter on every layer of the blocks whose B is not zero."""
    paths = find_targets(base.network, ["attention", "mlp"])
    linears = [path for path, module in base.network.named_modules() if isinstance(module, nn.Linear)]
    assert paths == [path for path in linears if "transformer_blocks." in path]
    adapter = inject(base.network, paths, 4, 2.0, seed=0)
    drawing = torch.Generator().manual_seed(1)
    for layer in adapter.layers.values():
        layer.up.data.normal_(std=0.1, generator=drawing)
    return adapter


def drawn(num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    drawing = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(num, 16, 4, 6, generator=drawing) for _ in range(2))
    return latents, noise, torch.tensor([3, 500, 999])[:num]


def peft_twin(folder: Path, adapter: Adapter) -> Flux2Transformer2DModel:
    """diffusers' transformer with the same adapter in PEFT, float64."""
    twin = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer").requires_grad_(False).double()
    twin.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(adapter.layers)))
    for path, layer in adapter.layers.items():
        theirs = twin.get_submodule(path)
        theirs.lora_A["default"].weight.data = layer.down.detach().double()
        theirs.lora_B["default"].weight.data = layer.up.detach().double()
    return twin


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' class compute in float64 where it goes to float32: rotations."""
    plain = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else plain(x))


def test_loss_and_gradients_equal_those_of_peft_in_float64(folder: Path, in_float64: None) -> None:
    base = loaded(folder)
    adapter = with_lora(base)
    twin = peft_twin(folder, adapter)
    latents, noise, timesteps = drawn()
    with torch.no_grad():
        states = base.encode_captions(CAPTIONS)["states"].double()
    base.network.double()
    for layer in adapter.layers.values():
        layer.double()
    x, e, s = latents.double(), noise.double(), ((timesteps + 1).double() / 1000).view(-1, 1, 1, 1)
    ours = (
        (velocity(base.network, base.levels.mix(x, e, timesteps), level(timesteps), states) - (e - x)).square().mean()
    )
    ours.backward()
    # As the training script of diffusers has it.
    noisy = (1 - s) * x + s * e
    output = twin(
        hidden_states=Flux2KleinPipeline._pack_latents(noisy),
        timestep=s.flatten(),
        guidance=None,
        encoder_hidden_states=states,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(states),
        img_ids=(places := Flux2KleinPipeline._prepare_latent_ids(noisy)),
        return_dict=False,
    )[0]
    theirs = (Flux2KleinPipeline._unpack_latents_with_ids(output, places) - (e - x)).square().mean()
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
        together = diffusion_loss(base, Batch(latents, noise, timesteps, text))
        each = [
            diffusion_loss(base, Batch(latents[i : i + 1], noise[i : i + 1], timesteps[i : i + 1], alone[i]))
            for i in range(3)
        ]
        torch.testing.assert_close(together, torch.cat(each), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(base.encode_captions(CAPTIONS)["states"], text["states"], rtol=1e-5, atol=1e-5)


def test_captions_are_read_as_the_pipeline_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    base, long = loaded(folder), "a red cat " * 200
    expected, _ = pipeline_of(folder).encode_prompt([CAPTIONS[1], long])
    with torch.no_grad():
        found = base.encode_captions([CAPTIONS[1], long])["states"]
    assert found.shape == (2, 512, 24)
    assert torch.equal(found, expected)
    asked = base._asked(["a zumi"])[0]
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert base.num_tokens(long) > base.max_tokens == 512
    assert not any("lm_head" in name for name, _ in base.text_encoders[0].named_parameters())


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
    pipeline = pipeline_of(folder)
    unwanted, _ = pipeline.encode_prompt(["blurry"] * 2, max_sequence_length=SHORT)
    predictions: list[Tensor] = []
    pipeline.transformer.register_forward_hook(lambda _, __, output: predictions.append(output[0]))
    expected = pipeline(
        prompt=list(request.prompts), negative_prompt_embeds=unwanted, num_inference_steps=3, guidance_scale=guidance,
        width=48, height=32, generator=[torch.Generator().manual_seed(5) for _ in range(2)],
        max_sequence_length=SHORT,
    ).images  # fmt: skip
    for ours, theirs in zip(images, expected, strict=True):
        assert ours.size == (48, 32)
        difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(theirs.tobytes()))
        assert difference.abs().max() <= 1
    # The pipeline predicts for the captions, then for the negative prompts.
    differences = torch.stack(predictions[::2]) - torch.stack(predictions[1::2]) if guidance > 1 else None
    norms = [] if differences is None else differences.square().mean(dim=(2, 3)).sqrt().mean(dim=0).tolist()
    assert watch.guidance_norms == pytest.approx(norms, rel=1e-4)


def test_latents_and_pixels_are_those_of_the_pipeline(folder: Path) -> None:
    base, pipeline = loaded(folder), pipeline_of(folder)
    assert (base.latent_factor, base.size_step_px, base.resolution_px) == (8, 8, 32)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = base.encode_pixels(pixels)
    assert moments.shape == (1, 32, 4, 6)
    latents = base.sample_latents(moments, torch.ones(1, 16, 4, 6))
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, None)
        torch.testing.assert_close(latents, expected)
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
        image = pipeline.image_processor.postprocess(pipeline.vae.decode(mode, return_dict=False)[0])[0]
    difference = torch.tensor(list(base.decode_latents(latents)[0].tobytes())) - torch.tensor(list(image.tobytes()))
    assert difference.abs().max() <= 1


def test_larger_images_are_shifted_further(folder: Path) -> None:
    base = loaded(folder)
    # FLUX.1's line through 256 and 4096 patches, here of 8 px.
    assert base.log_shift_at((128, 128)) == pytest.approx(0.5)
    assert base.log_shift_at((1024, 256)) == pytest.approx(1.15)
    assert base.log_shift == base.log_shift_at((32, 32)) < 0.5


@pytest.mark.parametrize("exposures", [1, 2, 7, 50])
def test_exposures_cover_the_density_of_their_image_s_size(folder: Path, exposures: int) -> None:
    config = parse_config({"data": {"folder": "x"}, "train": {"epochs": 1, "batch_size": 2}}, name="x")
    settings = training_settings(config, loaded(folder))
    sizes = [(32, 32), (512, 512), (1024, 256)]
    examples = tuple(
        Example(f"{index}", Path("x"), "x", size, size, repeats=exposures) for index, size in enumerate(sizes)
    )
    timesteps = make_schedule(settings, Dataset(examples, ())).timesteps
    for index, size in enumerate(sizes):
        shift = 0.5 + 0.65 * (size[0] * size[1] / 64 - 256) / 3840
        edges = Density("logit_normal", mean=shift).edges
        # A timestep on the edge of two slices is drawn in the lower one.
        slices = [int(edges[t] * exposures + 1e-9) for exposure, t in timesteps.items() if exposure.example == index]
        assert sorted(slices) == list(range(exposures))


def test_zero_terminal_snr_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.zero_terminal_snr"):
        loaded(folder).use_zero_terminal_snr()


@pytest.mark.parametrize(
    ("text", "option"),
    [(TextOptions(clip_skip=2), r"base\.clip_skip"), (TextOptions(max_windows=2), r"data\.max_token_windows")],
)
def test_what_is_for_clip_is_refused(folder: Path, text: TextOptions, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        loaded(folder, text=text)


def of_another_vae(pipeline: Flux2KleinPipeline) -> None:
    pipeline.vae.register_to_config(latent_channels=16)


def of_a_wider_encoder(pipeline: Flux2KleinPipeline) -> None:
    pipeline.text_encoder.config.hidden_size = 16


def of_a_shallow_encoder(pipeline: Flux2KleinPipeline) -> None:
    pipeline.text_encoder.config.num_hidden_layers = 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_vae, "VAE gives 64"),
        (of_a_wider_encoder, "28 layers of 16"),
        (of_a_shallow_encoder, "24 layers of 8"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    folder: Path, change: Callable[[Flux2KleinPipeline], Any], said: str
) -> None:
    pipeline = pipeline_of(folder)
    change(pipeline)
    source = Source(pipeline, "klein", None, lambda *_, **__: pipeline)
    with pytest.raises(BaseModelError, match=said):
        Flux2Klein(source, device=CPU, dtype=torch.float32, text=TextOptions())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda folder: change_index(folder, is_distilled=True), "distilled"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder"),
        (lambda folder: change_index(folder, _class_name="Flux2Pipeline"), r"Flux2Pipeline.*FLUX\.2 klein 4B"),
    ],
    ids=["distilled", "no text encoder", "FLUX.2 dev"],
)
def test_a_base_that_cannot_be_trained_is_refused(
    folder: Path, tmp_path: Path, edit: Callable[[Path], None], said: str
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "base"))
    edit(place)
    with pytest.raises(BaseModelError, match=said):
        loaded(place)


def change_index(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refused(folder: Path, document: dict[str, Any]) -> str:
    """What is said of a configuration, which is refused once the base is loaded."""
    config = parse_config({"data": {"folder": "x", "trigger": "zumi"}, **document}, name="x")
    with pytest.raises(ConfigError) as caught:
        base = loaded(folder)
        make_adapter(config, base)
        training_settings(config, base)
    return str(caught.value)


@pytest.mark.parametrize(
    ("document", "option"),
    [
        ({"lora": {"targets": ["attention", "text_encoder"]}}, "text_encoder"),
        ({"lora": {"targets": ["cross_attention"]}}, "attention, mlp"),
        ({"lora": {"targets": ["attention"]}, "timesteps": {"density": "speed"}}, r"timesteps.density"),
    ],
)
def test_what_is_for_other_families_is_refused(folder: Path, document: dict[str, Any], option: str) -> None:
    assert option in refused(folder, document)


def test_samplers_of_other_families_are_refused(folder: Path) -> None:
    request = PreviewRequest(("a cat",), (0,), "", 2, 1.0, sampler="euler_a", size_px=(32, 32))
    with pytest.raises(ConfigError, match=r"preview\.sampler"):
        list(draw(loaded(folder), request, request.wanted()))


def test_previews_of_sizes_that_do_not_divide_into_patches_are_refused(folder: Path) -> None:
    # The pipeline would draw smaller ones.
    request = PreviewRequest(("a cat",), (0,), "", 1, 1.0, size_px=(32, 36))
    with pytest.raises(ConfigError, match=r"preview\.width_px.*multiples of 8"):
        list(draw(loaded(folder), request, request.wanted()))


def test_text_states_are_kept_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path, loaded(folder))
    list(cache.fill_text(CAPTIONS))
    kept = [load_file(file)["states"] for file in tmp_path.rglob("*.safetensors")]
    assert [(states.dtype, states.shape) for states in kept] == [(torch.bfloat16, (SHORT, 24))] * 3
    assert cache.text(CAPTIONS)["states"].shape == (3, SHORT, 24)
