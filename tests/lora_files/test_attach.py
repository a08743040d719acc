import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import UNET_TARGETS, injected
from helpers.tiny import make_tiny_pipeline
from helpers.trainers import diffusers_script, kohya_trainer
from safetensors.torch import load_file, save_file

from sdlora.errors import DataError
from sdlora.lora.inject import Adapter, AdapterSpec, LoraWeights
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import LoraFile, read_file
from sdlora.lora_files.timestep_ranks import apply_timestep_rank
from sdlora.lora_files.write import LoraMetadata, save_lora

METADATA = LoraMetadata("hero", "base", "stable-diffusion-v1", 64, None, 1, 1, 1.7e9, {})
SETTING = TimestepRank(2, 1.0)
LAYERS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv",
    "0.proj",
]
# diffusers 0.42 drops the magnitudes of a text encoder in PEFT's own spelling; sdlora's files, below, have them.
MIXED = {"r": 3, "rank_pattern": {"to_k": 2, "q_proj": 5}, "alpha_pattern": {"to_q": 3, "attn2.to_k": 1, "k_proj": 9}}


def fresh(base: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


@torch.no_grad()
def outputs(pipeline: Any) -> torch.Tensor:
    """The UNet's and the text encoder's outputs to fixed inputs, one after the other."""
    generator = torch.Generator().manual_seed(4)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 16, generator=generator)
    noise: torch.Tensor = pipeline.unet(latents, torch.tensor([10, 500, 950]), text, return_dict=False)[0]
    states: torch.Tensor = pipeline.text_encoder(torch.arange(77)[None] * 3).last_hidden_state
    return torch.cat([noise.flatten(), states.flatten()])


def attached(pipeline: Any, file: Path) -> Adapter:
    return attach(pipeline.unet, read_file(file), text_encoders=[pipeline.text_encoder])


def as_in_diffusers(file: Path, base: Path) -> torch.Tensor:
    pipeline = fresh(base)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return outputs(pipeline)


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "kohya": lambda file, pipeline: kohya_trainer(file, pipeline),
    "kohya, text and convolutions": lambda file, pipeline: kohya_trainer(file, pipeline, text=True, conv=True),
    "diffusers": lambda file, pipeline: diffusers_script(file, pipeline, text=True),
    "diffusers, mixed": lambda file, pipeline: diffusers_script(file, pipeline, text=True, **MIXED),
    "PEFT, mixed": lambda file, pipeline: diffusers_script(file, pipeline, text=True, old_names=False, **MIXED),
    "PEFT, rsLoRA": lambda file, pipeline: diffusers_script(file, pipeline, old_names=False, use_rslora=True, **MIXED),
    "PEFT, convolutions": lambda file, pipeline: diffusers_script(
        file, pipeline, old_names=False, target_modules=LAYERS, rank_pattern={"conv1": 2}, alpha_pattern={"conv2": 1}
    ),
    "PEFT, DoRA": lambda file, pipeline: diffusers_script(file, pipeline, old_names=False, use_dora=True, **MIXED),
    "PEFT, DoRA, convolutions": lambda file, pipeline: diffusers_script(
        file, pipeline, old_names=False, use_dora=True, target_modules=LAYERS, rank_pattern={"conv1": 2}
    ),
}


@pytest.mark.parametrize("trainer", WRITERS)
def test_attached_file_predicts_as_in_diffusers(pipeline: Any, tiny_base: Path, tmp_path: Path, trainer: str) -> None:
    file = tmp_path / "lora.safetensors"
    WRITERS[trainer](file, fresh(tiny_base))
    plain = outputs(pipeline)
    adapter = attached(pipeline, file)
    found, expected = outputs(pipeline), as_in_diffusers(file, tiny_base)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with adapter.disabled():
        torch.testing.assert_close(outputs(pipeline), plain, atol=0, rtol=0)
    assert torch.equal(outputs(pipeline), found)
    adapter.remove()
    assert torch.equal(outputs(pipeline), plain)


def test_each_module_has_its_own_rank_and_alpha(pipeline: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Against the definition, W + alpha / r B A: diffusers itself takes one alpha for all attention layers."""
    file = tmp_path / "lora.safetensors"
    kohya_trainer(file, pipeline, text=True, conv=True, dtype=torch.float32)
    tensors = load_file(file)
    for index, name in enumerate(sorted({key.partition(".")[0] for key in tensors})):
        rank = 1 + index % 4
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:rank].contiguous()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :rank].contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(0.5 + index % 3)
    save_file(tensors, file)
    merged = fresh(tiny_base)
    for prefix, network in (("lora_unet_", merged.unet), ("lora_te_text_model_", merged.text_encoder)):
        for path, module in network.named_modules():
            name = prefix + path.replace(".", "_")
            if f"{name}.alpha" in tensors:
                down, up = (tensors[f"{name}.lora_{kind}.weight"].double() for kind in ("down", "up"))
                update = (up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
                module.weight.data += (float(tensors[f"{name}.alpha"]) / len(down) * update).float()
    adapter = attached(pipeline, file)
    assert len(adapter.layers) == len(tensors) // 3
    torch.testing.assert_close(outputs(pipeline), outputs(merged), atol=1e-5, rtol=0)


def test_magnitudes_are_read_in_any_shape(pipeline: Any, tiny_base: Path, tmp_path: Path) -> None:
    WRITERS["PEFT, DoRA, convolutions"](tmp_path / "lora.safetensors", fresh(tiny_base))
    file = read_file(tmp_path / "lora.safetensors")
    flat = {
        name: replace(w, magnitude=w.magnitude.flatten()) for name, w in file.state.items() if w.magnitude is not None
    }
    assert len(flat) == len(file.state)
    attach(pipeline.unet, file)
    other = fresh(tiny_base)
    attach(other.unet, replace(file, state=flat))
    assert torch.equal(outputs(other), outputs(pipeline))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_own_file_uses_its_timestep_ranks(pipeline: Any, tiny_base: Path, tmp_path: Path, init: Any) -> None:
    file = tmp_path / "hero.safetensors"
    spec = AdapterSpec(timestep_rank=SETTING, init=init, target_ranks={"conv": 4})
    trained = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec, rank=8)
    expected = outputs(pipeline)
    save_lora(file, trained.state(), metadata=replace(METADATA, timestep_rank=SETTING))
    unmasked = as_in_diffusers(file, tiny_base)

    other = fresh(tiny_base)
    adapter = attached(other, file)
    found = outputs(other)
    assert (found - unmasked).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(adapter.initial_factors()) == (0 if init == "gaussian" else 2 * len(adapter.layers))
    theirs = fresh(tiny_base)
    theirs.load_lora_weights(file)
    apply_timestep_rank(theirs, file)
    torch.testing.assert_close(found, outputs(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [AdapterSpec(dora=True), AdapterSpec(init="orthogonal"), AdapterSpec(rslora=True)])
def test_own_file_equals_the_trained_adapter(pipeline: Any, tiny_base: Path, tmp_path: Path, spec: AdapterSpec) -> None:
    file = tmp_path / "hero.safetensors"
    trained = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec, rank=4)
    save_lora(file, trained.state(), metadata=METADATA)
    other = fresh(tiny_base)
    attached(other, file)
    torch.testing.assert_close(outputs(other), outputs(pipeline), atol=1e-5, rtol=0)
    if spec.dora:  # diffusers drops magnitudes under kohya's names
        save_lora(file, trained.state(), metadata=METADATA, spelling="peft")
    torch.testing.assert_close(outputs(other), as_in_diffusers(file, tiny_base), atol=1e-5, rtol=0)


def test_lora_of_another_family_is_refused_and_the_base_unchanged(pipeline: Any, tmp_path: Path) -> None:
    make_tiny_pipeline(tmp_path / "wide", text_width=32)
    kohya_trainer(tmp_path / "wide.safetensors", fresh(tmp_path / "wide"))
    file = read_file(tmp_path / "wide.safetensors")
    plain = outputs(pipeline)
    with pytest.raises(DataError, match=r"wide\.safetensors.*attn2_to_k.*text of width 32"):
        attach(pipeline.unet, file)
    second = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    more = replace(file, state={second: LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    with pytest.raises(DataError, match=rf"1 of its 1 modules.*'{second}'.*stable-diffusion-xl"):
        attach(pipeline.unet, more, text_encoders=[pipeline.text_encoder])
    kohya_trainer(tmp_path / "text.safetensors", pipeline, text=True)
    with pytest.raises(DataError, match=r"text\.safetensors.*'lora_te_text_model_encoder"):
        attach(pipeline.unet, read_file(tmp_path / "text.safetensors"))
    assert torch.equal(outputs(pipeline), plain)


def one_module(pipeline: Any, metadata: dict[str, str], *, rank: int = 3, alpha: float = 1.0) -> LoraFile:
    weight = pipeline.unet.get_parameter("time_embedding.linear_1.weight")
    weights = LoraWeights(torch.ones(rank, weight.shape[1]), torch.ones(len(weight), rank), alpha)
    return LoraFile("odd", {"lora_unet_time_embedding_linear_1": weights}, metadata, torch.float32, "kohya")


@pytest.mark.parametrize(
    ("metadata", "alpha", "reason"),
    [
        ({}, math.nan, "odd: 'lora_unet_time.*no alpha"),
        ({"sdlora.timestep_rank_min": "2"}, 1.0, "alpha None"),
        ({"sdlora.timestep_rank_alpha": "1"}, 1.0, "minimum None"),
        ({"sdlora.timestep_rank_min": "0", "sdlora.timestep_rank_alpha": "1"}, 1.0, "minimum '0'"),
        ({"sdlora.timestep_rank_min": "few", "sdlora.timestep_rank_alpha": "1"}, 1.0, "minimum 'few'"),
        ({"sdlora.timestep_rank_min": "1", "sdlora.timestep_rank_alpha": "nan"}, 1.0, "alpha 'nan'"),
        ({"sdlora.timestep_rank_min": "4", "sdlora.timestep_rank_alpha": "1"}, 1.0, "at least 4 ranks"),
        ({"sdlora.frozen_start": "half"}, 1.0, "frozen, but it has 3"),
    ],
)
def test_inconsistent_metadata_is_refused(pipeline: Any, metadata: dict[str, str], alpha: float, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        attach(pipeline.unet, one_module(pipeline, metadata, alpha=alpha))


def test_second_adapter_on_a_base_is_refused(pipeline: Any) -> None:
    file = one_module(pipeline, {})
    adapter = attach(pipeline.unet, file)
    assert list(adapter.layers) == ["time_embedding.linear_1"]
    with pytest.raises(AssertionError, match="one adapter"):
        attach(pipeline.unet, file)
    adapter.remove()
    attach(pipeline.unet, file)
