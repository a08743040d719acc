"""Files for Stable Diffusion XL, of sdlora and of other trainers, against diffusers' outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.adapters import UNET_TARGETS, perturb
from helpers.ldm import unet_layer
from helpers.tiny import make_tiny
from helpers.trainers import diffusers_script
from safetensors.torch import save_file
from typer.testing import CliRunner

from sdlora.cli.main import app
from sdlora.lora.inject import AdapterSpec, adaptable, find_targets, inject
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import Spelling, describe_lora, read_file
from sdlora.lora_files.verify import verify_lora
from sdlora.lora_files.write import LoraMetadata, save_lora

METADATA = LoraMetadata("hero", "base", "stable-diffusion-xl-v1-base", 64, None, 1, 1, 1.7e9, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    make_tiny("sdxl", folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder)


@pytest.fixture
def pipeline(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


def encoders(pipeline: Any) -> list[Any]:
    return [pipeline.text_encoder, pipeline.text_encoder_2]


@torch.no_grad()
def outputs(pipeline: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    latents, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, 40), (24,)))
    more = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    unet = pipeline.unet(latents, torch.tensor([10, 700]), text, added_cond_kwargs=more).sample
    tokens = torch.arange(2 * 77).reshape(2, 77)
    return [unet, *(encoder(tokens, output_hidden_states=True).hidden_states[-2] for encoder in encoders(pipeline))]


SPECS = [
    AdapterSpec(),
    AdapterSpec(dora=True),
    AdapterSpec(init="pissa", target_alphas={"conv": 5.0, "text_encoder": 3.0}),
    AdapterSpec(timestep_rank=TimestepRank(1, 1.0), init="orthogonal"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_file_of_every_kind_loads_exactly(pipeline: Any, tmp_path: Path, spec: AdapterSpec) -> None:
    text = encoders(pipeline)
    targets = find_targets(pipeline.unet, [*UNET_TARGETS, "text_encoder"], text)
    adapter = inject(pipeline.unet, targets, 4, 2.0, seed=1, spec=spec, text_encoders=text)
    perturb(adapter)
    adapter.remove()
    # diffusers reads magnitudes under PEFT's names alone.
    spelling: Spelling = "peft" if spec.dora else "kohya"
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=METADATA, spelling=spelling)
    verification = verify_lora(tmp_path / "hero.safetensors", adapter.state(), pipeline, spec.timestep_rank)
    assert verification.max_error == 0.0
    assert verification.num_modules == len(targets)
    assert describe_lora(tmp_path / "hero.safetensors")["dora"] == spec.dora


def sd_scripts(file: Path, pipeline: Any) -> None:
    """A file as sd-scripts writes it for Stable Diffusion XL: the UNet by its authors' blocks, two text encoders."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    attentive = {0, 1}
    for prefix, network in (("lora_unet_", pipeline.unet), ("lora_te1_", pipeline.text_encoder),
                            ("lora_te2_", pipeline.text_encoder_2)):  # fmt: skip
        for path in adaptable(network):
            if prefix == "lora_unet_":
                if not path.startswith(("down_blocks", "mid_block", "up_blocks")):
                    continue
                name = unet_layer(path, 2, attentive)
            elif ".layers." in path:
                name = "text_model." + path.removeprefix("text_model.")
            else:
                continue
            shape = network.get_parameter(f"{path}.weight").shape
            down = torch.randn(4, *shape[1:], generator=generator) * 0.1
            up = torch.randn(shape[0], 4, *(1 for _ in shape[2:]), generator=generator) * 0.1
            key = prefix + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
    save_file(tensors, file, metadata={"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"})


@pytest.mark.parametrize("trainer", ["sd-scripts", "diffusers"])
def test_file_of_another_trainer_predicts_as_in_diffusers(
    pipeline: Any, folder: Path, tmp_path: Path, trainer: str
) -> None:
    file = tmp_path / "theirs.safetensors"
    if trainer == "sd-scripts":
        sd_scripts(file, StableDiffusionXLPipeline.from_pretrained(folder))
    else:
        diffusers_script(file, StableDiffusionXLPipeline.from_pretrained(folder), text=True)
    before = outputs(pipeline)
    adapter = attach(pipeline.unet, read_file(file), text_encoders=encoders(pipeline))
    ours = outputs(pipeline)
    adapter.remove()
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    theirs = outputs(pipeline)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    changed = [not torch.equal(*pair) for pair in zip(theirs, before, strict=True)]
    assert changed == [True, True, trainer == "sd-scripts"]


def test_conversion_to_peft_and_back_is_exact(folder: Path, tmp_path: Path) -> None:
    sd_scripts(tmp_path / "theirs.safetensors", StableDiffusionXLPipeline.from_pretrained(folder))
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("theirs", "peft", "back"))
    for source, target, names in ((first, second, "peft"), (second, third, "kohya")):
        command = ["convert", str(source), str(target), "--to", names]
        result = CliRunner().invoke(app, [*command, *(["--base", str(folder)] if names == "peft" else [])])
        assert result.exit_code == 0, result.output
    before, after = read_file(first).state, read_file(third).state
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[key].up, after[key].up) and torch.equal(before[key].down, after[key].down) for key in before
    )
    pipelines = [StableDiffusionXLPipeline.from_pretrained(folder) for _ in range(2)]
    for pipeline, file in zip(pipelines, (first, second), strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    for one, other in zip(outputs(pipelines[0]), outputs(pipelines[1]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
