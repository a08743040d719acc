"""The same adapter in PEFT: what sdlora's own layers are measured against."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from sdlora.lora.inject import Adapter


def peft_twin(unet: Any, adapter: Adapter) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Put an adapter's weights on another copy of its UNet through PEFT.

    Args:
        unet: A copy without adapters; changed in place.
        adapter: Plain LoRA of one rank and alpha.

    Returns:
        A and B by module path.
    """
    first = next(iter(adapter.layers.values()))
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=first.rank, lora_alpha=first.alpha, target_modules=list(adapter.layers)))
    found = {}
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            module = unet.get_submodule(path)
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            down.copy_(layer.down)
            up.copy_(layer.up)
            found[path] = (down, up)
    return found
