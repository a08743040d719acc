"""LoRAs merged into transformers that lie alone in one file, and extracted from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import WHOLE_HEADS, WHOLE_HEADS_KLEIN, make_tiny_klein, make_tiny_z_image
from helpers.transformer_files import Tensors, in_fp8, klein, weights_of, write, z_image
from safetensors.torch import load_file
from torch import Tensor

from sdlora.errors import BaseModelError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.algebra import update
from sdlora.lora_files.base_weights import base_weights
from sdlora.lora_files.merge import differences, merge_into
from sdlora.lora_files.names import kohya_name

CASES: dict[str, tuple[Callable[..., None], dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "z-image": (make_tiny_z_image, WHOLE_HEADS, z_image),
    "klein": (make_tiny_klein, WHOLE_HEADS_KLEIN, klein),
}


def lora(state: Tensors, ending: str) -> LoraState:
    """A random LoRA on the layers whose weights' names end so."""
    draw = torch.Generator().manual_seed(0)
    found: LoraState = {}
    for name in sorted(state):
        if name.endswith(f"{ending}.weight"):
            rows, columns = state[name].shape
            up, down = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
            found[kohya_name(name.removesuffix(".weight"), two_text_encoders=False)] = LoraWeights(down, up, 2.0)
    return found


@pytest.mark.parametrize("form", CASES)
def test_merged_weights_lie_where_the_conversion_reads_them(tmp_path: Path, form: str) -> None:
    make, config, layout = CASES[form]
    make(tmp_path / "folder", **config)
    state = weights_of(tmp_path / "folder")
    base = write(tmp_path / "base.safetensors", layout(state), prefix="model.diffusion_model.")
    # Queries lie beside keys and values in one tensor of the file; the others are tensors of their own.
    weights = lora(state, "to_q") | lora(state, "to_out.0")
    assert merge_into(base_weights(base), tmp_path / "merged.safetensors", weights) == len(weights) >= 2
    expected = {
        name: tensor + update(weights[own]).float()
        if (own := kohya_name(name.removesuffix(".weight"), two_text_encoders=False)) in weights
        else tensor
        for name, tensor in state.items()
    }
    found = load_file(tmp_path / "merged.safetensors")
    for name, tensor in layout(expected).items():
        assert torch.equal(found[f"model.diffusion_model.{name}"], tensor), name
    changes, others = differences(base_weights(tmp_path / "merged.safetensors"), base_weights(base))
    recovered = dict[str, Tensor](changes)
    assert recovered.keys() == weights.keys() and not others
    for name, change in recovered.items():
        torch.testing.assert_close(change, update(weights[name]).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", CASES)
def test_layers_that_a_file_holds_in_another_order_are_in_their_own(tmp_path: Path, form: str) -> None:
    make, config, layout = CASES[form]
    make(tmp_path / "folder", **config)
    state = weights_of(tmp_path / "folder")
    base = write(tmp_path / "base.safetensors", layout(state))
    # FLUX.2's last layer has scale and shift the other way round in diffusers.
    name = "norm_out.linear" if form == "klein" else "all_final_layer.2-1.linear"
    weights = lora(state, name)
    merge_into(base_weights(base), tmp_path / "merged.safetensors", weights)
    key = f"{name}.weight"
    expected = layout(state | {key: state[key] + update(*weights.values()).float()})
    found = load_file(tmp_path / "merged.safetensors")
    for one, tensor in expected.items():
        assert torch.equal(found[one], tensor), one


def test_weights_of_8_bits_are_refused(tmp_path: Path) -> None:
    make_tiny_z_image(tmp_path / "folder", **WHOLE_HEADS)
    file = write(tmp_path / "fp8.safetensors", in_fp8(z_image(weights_of(tmp_path / "folder"))))
    with pytest.raises(BaseModelError, match="too coarse"):
        base_weights(file)
