"""LoRA files as other trainers write them, of a base's layers and random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
# Without out_proj, diffusers takes kohya's names of text encoders for PEFT's and drops them with a warning.
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def diffusers_script(
    file: Path, pipeline: Any, *, text: bool = False, told: bool = True, old_names: bool = True, **config: Any
) -> None:
    """What diffusers' training scripts leave: PEFT's adapter through diffusers' own functions.

    Args:
        file: The file to write.
        pipeline: A pipeline; its networks keep the adapter.
        text: Whether the text encoder has one, too.
        told: Whether metadata tells the alpha, as newer scripts do.
        old_names: Whether the state goes through `convert_state_dict_to_diffusers`, as in the scripts.
        config: Other settings of `LoraConfig`.
    """
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", **config}
    networks = {"unet": (pipeline.unet, UNET_LAYERS)}
    if text:
        networks["text_encoder"] = (pipeline.text_encoder, TEXT_LAYERS)
    layers = {}
    for name, (network, targets) in networks.items():
        network.add_adapter(LoraConfig(**{"target_modules": list(targets), **settings}))
        _fill(network)
        state = get_peft_model_state_dict(network)
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state) if old_names else state
    metadata = _collate_lora_metadata({name: network for name, (network, _) in networks.items()}) if told else {}
    StableDiffusionPipeline.save_lora_weights(file.parent, weight_name=file.name, **layers, **metadata)


def _fill(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def kohya_trainer(
    file: Path,
    pipeline: Any,
    *,
    text: bool = False,
    conv: bool = False,
    rank: int = 4,
    alpha: float | None = 1.0,
    dtype: torch.dtype = torch.float16,
    seed: int = 5,
) -> None:
    """What sd-scripts leaves for SD 1.x: all linear layers of the blocks, everything in half precision."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    networks = [("lora_unet_", pipeline.unet)] + ([("lora_te_text_model_", pipeline.text_encoder)] if text else [])
    for prefix, network in networks:
        for path, module in network.named_modules():
            wanted = "attentions" in path or ".layers." in path or (conv and "resnets" in path)
            if not wanted or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            kernel = module.weight.shape[2:]
            down = torch.randn(rank, module.weight.shape[1], *kernel, generator=generator) * 0.1
            up = torch.randn(module.weight.shape[0], rank, *(1 for _ in kernel), generator=generator) * 0.1
            name = prefix + path.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down.to(dtype), f"{name}.lora_up.weight": up.to(dtype)}
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v1", "ss_sd_model_hash": "abc", "ss_tag_frequency": '{"set": {"cat": 3}}',
        "ss_steps": "100", "sshs_model_hash": "old", "sshs_legacy_hash": "old", "modelspec.hash_sha256": "0xold",
        "modelspec.title": "theirs",
    }  # fmt: skip
    save_file(tensors, file, metadata=metadata)
