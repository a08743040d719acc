"""Other programs' own code on our files, and ours on theirs: every key taken, every weight the same.

    SDLORA_COMFYUI=… SDLORA_A1111=… SDLORA_SD_SCRIPTS=… pytest tests/interop

Each names a checkout. Keys are counted at the families' true shapes; weights are compared on layers spread over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.ldm import authors_layout
from helpers.peers import checkout, importing
from interop import FAMILIES, Cell, on_meta, random_state
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlora.common.families import Family
from sdlora.lora.inject import LoraState, LoraWeights, network_of
from sdlora.lora_files.algebra import update
from sdlora.lora_files.elsewhere import dora_elsewhere
from sdlora.lora_files.names import diffusers_name, folded, kohya_name, to_kohya, to_peft, to_transformer
from sdlora.lora_files.read import parse_lora
from sdlora.models.architectures import ARCHITECTURES

NUM_MODULES = {"sd1": 328, "sd2": 394, "sdxl": 1035}
COMPARED = 40  # layers whose weights are computed, of each file
# What the programs import beside torch, which reading a LoRA does not use.
EMPTY = [
    "torchvision", "einops", "torchsde", "av", "comfy_kitchen", "kornia", "spandrel", "torchaudio", "aiohttp", "cv2",
    "modules", "gradio", "toml", "imagesize", "voluptuous",
]  # fmt: skip

Computed = Callable[[str, Tensor], Tensor]
"""The weight that a program makes of a layer's, by the key of our file and the base's weight."""


@dataclass(frozen=True)
class Base:
    """A family at its true shapes: the layers' shapes by their authors' names and by ours."""

    authors: dict[str, tuple[int, ...]]
    encoders: tuple[nn.Module, ...]
    unet: nn.Module

    def shape(self, path: str) -> tuple[int, ...]:
        network = network_of(path)
        owner = self.unet if network == "unet" else self.encoders[network.endswith("_2")]
        return tuple(owner.get_submodule(path.removeprefix(f"{network}.")).weight.shape)


@cache
def base_of(family: Family) -> Base:
    unet, text = on_meta(ARCHITECTURES[family])
    with torch.device("meta"):
        networks = {"unet": unet, "vae": AutoencoderKL.from_config(ARCHITECTURES[family].vae)}
        networks |= dict(zip(("text_encoder", "text_encoder_2"), text, strict=False))
        layout = authors_layout(family, networks)
    return Base({key: tuple(tensor.shape) for key, tensor in layout.items()}, tuple(text), unet)


def adapter(family: Family, rank: int = 2, alpha: float = 1.0) -> LoraState:
    """A LoRA with random factors on every layer that one can be on."""
    base = base_of(family)
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * 0.05

    state = random_state(base.unet, base.encoders, Cell(rank, alpha, True))
    return {path: replace(weights, down=drawn(weights.down), up=drawn(weights.up)) for path, weights in state.items()}


def greatest_error(state: LoraState, keys: dict[str, str], computed: Computed) -> float:
    """Of the weights that a program computes, against W + alpha / r B A."""
    errors = []
    for path in [*state][:: max(1, len(state) // COMPARED)]:
        weights = state[path]
        shape = (weights.up.shape[0], *weights.down.shape[1:])
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
        expected = weight + update(weights).float().view(shape)
        errors.append(float((computed(keys[path], weight.clone()) - expected).abs().max()))
    return max(errors)


# --- ComfyUI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def comfy() -> Iterator[Any]:
    with importing(checkout("SDLORA_COMFYUI"), empty=EMPTY, own=["comfy"]):
        from comfy.cli_args import args

        args.cpu = True
        import comfy.lora
        import comfy.lora_convert
        import comfy.model_detection

        yield comfy


def comfy_keys(comfy: Any, family: Family) -> dict[str, Any]:
    """ComfyUI's map of names, made from a checkpoint's own layers."""
    base = base_of(family)
    unet = {key: torch.empty(shape, device="meta") for key, shape in base.authors.items() if "diffusion_model" in key}
    settings = comfy.model_detection.detect_unet_config(unet, "model.diffusion_model.")
    config = comfy.model_detection.model_config_from_unet_config(settings)
    model = SimpleNamespace(model_config=config, state_dict=lambda: {key.removeprefix("model."): 0 for key in unet})
    keys: dict[str, Any] = comfy.lora.model_lora_keys_unet(model, {})
    clips = {"sd1": ["clip_l"], "sd2": ["clip_h"], "sdxl": ["clip_l", "clip_g"]}[family]
    text = {
        f"{clip}.transformer.text_model.{path.removeprefix('text_model.')}": 0
        for clip, encoder in zip(clips, base.encoders, strict=True)
        for path in encoder.state_dict()
    }
    keys.update(comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: text), {}))
    return keys


def comfy_patches(comfy: Any, tensors: dict[str, Tensor], keys: dict[str, Any]) -> tuple[dict[Any, Any], list[str]]:
    """What ComfyUI makes of a file, and the keys that it does not take."""
    unread: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.lora.logging, "warning", lambda message: unread.append(message))
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), keys)
    return patches, unread


def comfy_computes(comfy: Any, patches: dict[Any, Any], keys: dict[str, Any]) -> Computed:
    def computed(name: str, weight: Tensor) -> Tensor:
        patch = patches[keys[name]]
        return comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, name)  # type: ignore[no-any-return]

    return computed


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_takes_every_key_at_its_strength(family: Family, comfy: Any) -> None:
    state, keys = adapter(family), comfy_keys(comfy, family)
    tensors = to_kohya(state, two_text_encoders=family == "sdxl")
    names = {path: kohya_name(path, two_text_encoders=family == "sdxl") for path in state}
    for alphas in (torch.float32, torch.int64):  # integers, as three other writers store them
        written = {key: tensor.to(alphas) if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
        patches, unread = comfy_patches(comfy, written, keys)
        assert (len(patches), unread) == (NUM_MODULES[family], [])
        assert greatest_error(state, names, comfy_computes(comfy, patches, keys)) < 1e-6


def test_comfyui_takes_a_lora_on_the_convolutions_of_sdxl_alone(comfy: Any) -> None:
    state = {path: weights for path, weights in adapter("sdxl").items() if weights.down.dim() == 4}
    patches, unread = comfy_patches(comfy, to_kohya(state, two_text_encoders=True), comfy_keys(comfy, "sdxl"))
    assert (len(patches), unread) == (len(state), [])


def with_magnitudes(state: LoraState) -> tuple[LoraState, dict[str, Tensor]]:
    """A DoRA of some layers, and the base's weights that it was trained on."""
    weights, chosen = {}, {}
    for path in [*state][:: len(state) // COMPARED]:
        one = state[path]
        shape = (one.up.shape[0], *one.down.shape[1:])
        weights[path] = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
        norms = torch.linalg.vector_norm(weights[path].flatten(1), dim=1) * 1.1
        chosen[path] = replace(one, magnitude=norms.reshape((1, -1, 1, 1) if one.down.dim() == 4 else (-1,)))
    return chosen, weights


def told_error(state: LoraState, bases: dict[str, Tensor], program: str) -> float:
    """The share by which a program misses a DoRA, as the end of a run tells it."""
    layers = {path: SimpleNamespace(get_parameter=lambda _, w=weight: w) for path, weight in bases.items()}
    network = SimpleNamespace(get_submodule=lambda path: layers[path])
    return dora_elsewhere({"unet": network}, state)[program]  # type: ignore[dict-item]


def found_error(state: LoraState, bases: dict[str, Tensor], computed: Computed, names: dict[str, str]) -> float:
    wrong = changed = 0.0
    for path, one in state.items():
        base = bases[path]
        total = base + update(one).float().view_as(base)
        norms = torch.linalg.vector_norm(total.flatten(1), dim=1)
        assert one.magnitude is not None
        trained = total * (one.magnitude.flatten() / norms).reshape(-1, *(1 for _ in base.shape[1:]))
        changed += float((trained - base).square().sum())
        wrong += float((computed(names[path], base.clone()) - trained).square().sum())
    return (wrong / changed) ** 0.5


def test_comfyui_misses_a_dora_by_what_the_run_tells(comfy: Any) -> None:
    unet = {path: weights for path, weights in adapter("sd1").items() if network_of(path) == "unet"}
    state, bases = with_magnitudes(unet)
    tensors, keys = to_kohya(state), comfy_keys(comfy, "sd1")
    patches, unread = comfy_patches(comfy, tensors, keys)
    assert (len(patches), unread) == (len(state), [])
    found = found_error(state, bases, comfy_computes(comfy, patches, keys), {path: kohya_name(path) for path in state})
    assert found == pytest.approx(told_error(state, bases, "ComfyUI"), rel=1e-3)


def test_comfyui_takes_the_half_of_peft_names_that_the_docs_tell(comfy: Any) -> None:
    unet = {path: weights for path, weights in adapter("sd1").items() if network_of(path) == "unet"}
    patches, _ = comfy_patches(comfy, to_peft(unet)[0], comfy_keys(comfy, "sd1"))
    assert (len(unet), len(patches)) == (256, 128)


def test_comfyui_takes_every_key_of_z_image(comfy: Any) -> None:
    """Its authors' attention is one layer for queries, keys and values, of which ours adapts each."""
    layers, width = 2, 3840
    config = SimpleNamespace(unet_config={"n_layers": layers, "dim": width, "n_refiner_layers": 1})
    model = object.__new__(type("Model", (comfy.model_base.Lumina2,), {"state_dict": lambda self: {}}))
    object.__setattr__(model, "model_config", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.utils, "unet_to_diffusers", lambda _: {})
        keys = comfy.lora.model_lora_keys_unet(model, {})
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layers.{layer}.{name}": LoraWeights(
            torch.randn(2, width, generator=generator) * 0.02, torch.randn(width, 2, generator=generator) * 0.02, 1.0
        )
        for layer in range(layers)
        for name in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1")
    }
    patches, unread = comfy_patches(comfy, to_transformer(folded(state), "diffusion_model."), keys)
    assert (len(patches), unread) == (len(state), [])
    offsets = sorted(key[1][1] for key in patches if isinstance(key, tuple))
    assert offsets == sorted([0, width, 2 * width] * layers)


# --- A1111 ------------------------------------------------------------------------------------------------------------


def a1111_layers(family: Family) -> dict[str, nn.Module]:
    """A1111's map of names to the modules of a checkpoint."""
    found: dict[str, nn.Module] = {}
    for key, shape in base_of(family).authors.items():
        name = key.removeprefix("model.").removeprefix("cond_stage_model.").removeprefix("conditioner.embedders.")
        layer, _, kind = name.rpartition(".")
        with torch.device("meta"):
            if kind == "in_proj_weight":
                found[layer.replace(".", "_")] = nn.MultiheadAttention(shape[1], 1)
            elif kind == "weight" and len(shape) == 2:
                found[layer.replace(".", "_")] = nn.Linear(shape[1], shape[0])
            elif kind == "weight" and len(shape) == 4:
                found[layer.replace(".", "_")] = nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)
        # A module's name tells which of two kinds of text encoders a checkpoint has.
        if layer.startswith("model.transformer.resblocks."):
            found["model_transformer_resblocks"] = nn.Identity()
    return found


@pytest.fixture
def a1111() -> Iterator[Any]:
    folder = checkout("SDLORA_A1111") / "extensions-builtin" / "Lora"
    own = [file.stem for file in folder.glob("*.py")]
    with importing(folder, empty=EMPTY, own=own):
        import modules.devices as devices
        import modules.models.sd3.mmdit as mmdit
        import modules.shared as shared
        from modules import sd_models

        class QkvLinear(nn.Linear):
            pass

        mmdit.QkvLinear = QkvLinear
        devices.cpu = devices.device = torch.device("cpu")
        devices.dtype = torch.float32
        sd_models.read_state_dict = load_file
        shared.opts.data = {}
        import networks

        yield networks


def a1111_network(networks: Any, family: Family, tensors: dict[str, Tensor], file: Path) -> tuple[Any, list[str]]:
    """What A1111 makes of a file, and the keys that it does not take."""
    from safetensors.torch import save_file

    save_file(tensors, file)
    networks.shared.sd_model = SimpleNamespace(network_layer_mapping=a1111_layers(family), is_sdxl=family == "sdxl")
    unread: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks.logging, "debug", lambda message: unread.append(message))
        return networks.load_network("x", SimpleNamespace(filename=str(file))), unread


def a1111_computes(net: Any) -> Computed:
    by_key = {module.network_key.partition(".")[0]: module for module in net.modules.values()}
    net.unet_multiplier = net.te_multiplier = 1.0

    def computed(name: str, weight: Tensor) -> Tensor:
        return weight + by_key[name].calc_updown(weight)[0]  # type: ignore[no-any-return]

    return computed


@pytest.mark.parametrize("family", FAMILIES)
def test_a1111_takes_every_key_at_its_strength(family: Family, a1111: Any, tmp_path: Path) -> None:
    state = adapter(family)
    tensors = to_kohya(state, two_text_encoders=family == "sdxl")
    written = dict(zip(state, dict.fromkeys(key.partition(".")[0] for key in tensors), strict=True))
    net, unread = a1111_network(a1111, family, tensors, tmp_path / "x.safetensors")
    assert (len(net.modules), unread) == (NUM_MODULES[family], [])
    assert greatest_error(state, written, a1111_computes(net)) < 1e-6


def test_a1111_misses_a_dora_by_what_the_run_tells(a1111: Any, tmp_path: Path) -> None:
    unet = {path: weights for path, weights in adapter("sd1").items() if network_of(path) == "unet"}
    state, bases = with_magnitudes(unet)
    net, unread = a1111_network(a1111, "sd1", to_kohya(state), tmp_path / "x.safetensors")
    assert (len(net.modules), unread) == (len(state), [])
    names = {path: kohya_name(path) for path in state}
    found = found_error(state, bases, a1111_computes(net), names)
    assert found == pytest.approx(told_error(state, bases, "A1111"), rel=1e-3)


# --- sd-scripts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kohya() -> Iterator[Any]:
    with importing(checkout("SDLORA_SD_SCRIPTS"), empty=EMPTY, own=["networks", "library"]):
        import networks.lora
        from library.sdxl_original_unet import SdxlUNet2DConditionModel

        yield SimpleNamespace(lora=networks.lora, sdxl_unet=SdxlUNet2DConditionModel)


def kohya_unet(kohya: Any, family: Family) -> nn.Module:
    if family != "sdxl":
        return base_of(family).unet
    with torch.device("meta"):
        return kohya.sdxl_unet()  # type: ignore[no-any-return]


def trained_by_sd_scripts(state: LoraState) -> LoraState:
    """The layers that sd-scripts knows: those of the attention blocks and of the resnets, not the first and last."""
    apart = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    return {path: w for path, w in state.items() if network_of(path) == "unet" and not path.startswith(apart)}


@pytest.mark.parametrize("family", FAMILIES)
def test_sd_scripts_takes_every_key_at_its_strength(family: Family, kohya: Any) -> None:
    state = trained_by_sd_scripts(adapter(family))
    tensors = to_kohya(state, two_text_encoders=family == "sdxl")
    unet = kohya_unet(kohya, family)
    network, _ = kohya.lora.create_network_from_weights(1.0, None, None, [], unet, weights_sd=dict(tensors))
    assert len(network.unet_loras) == len(state)
    network.apply_to([], unet, False, True)
    found = network.load_state_dict(tensors, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    by_name = {module.lora_name: module for module in network.unet_loras}
    written = dict(zip(state, dict.fromkeys(key.partition(".")[0] for key in tensors), strict=True))

    def computed(name: str, weight: Tensor) -> Tensor:
        return weight + kohya.lora.LoRAInfModule.get_weight(by_name[name]).view_as(weight)  # type: ignore[no-any-return]

    assert greatest_error(state, written, computed) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_sd_scripts_are_read_at_their_strength(family: Family, kohya: Any, tmp_path: Path) -> None:
    unet = kohya_unet(kohya, family)
    network = kohya.lora.create_network(1.0, 2, 1.0, None, [], unet, conv_dim=4, conv_alpha=2.0)
    network.apply_to([], unet, False, True)
    for module in network.unet_loras:
        nn.init.normal_(module.lora_up.weight, std=0.05)
    tensors = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    file = parse_lora(tensors, {}, name="theirs")
    assert len(file.state) == len(network.unet_loras)
    for module in network.unet_loras:
        theirs = kohya.lora.LoRAInfModule.get_weight(module)
        ours = update(file.state[diffusers_name(module.lora_name)])
        assert float((ours.view_as(theirs) - theirs).abs().max()) < 1e-6
