"""Every file loads everywhere: all ranks, alphas and families, on every layer that a LoRA can be on.

Names are counted at the families' true shapes, against what ComfyUI and A1111 read (`readers.py`). diffusers itself
loads the files at small shapes here, and at true ones in `tests/benchmarks/interop.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.promises import Figure
from helpers.readers import a1111_reads, comfyui, unet_names
from helpers.tiny import TINY, make_tiny
from interop import CELLS, FAMILIES, UNET_TARGETS, Cell, on_meta, random_state, save_and_verify
from torch import nn

from sdlora.common.families import Family
from sdlora.lora.inject import TARGETS, adaptable, find_targets
from sdlora.lora_files.names import to_kohya
from sdlora.models.architectures import ARCHITECTURES

# Modules by family: on the UNet alone, and with the text encoders.
# SDXL has 70 transformer blocks of 10 layers, 11 attentions of 2, 17 resnets of 2, 11 shortcuts and 4 scalers.
NUM_MODULES = {"sd1": (256, 328), "sd2": (256, 394), "sdxl": (771, 1035)}


@pytest.fixture(scope="module")
def networks() -> dict[Family, tuple[nn.Module, list[nn.Module]]]:
    return {family: on_meta(ARCHITECTURES[family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_reader_maps_hold_every_layer_of_the_blocks(
    family: Family, networks: dict[Family, tuple[nn.Module, list[nn.Module]]]
) -> None:
    """The maps of the readers contain exactly the network's layers, under both names."""
    own = {path for path in adaptable(networks[family][0]) if path.startswith(("down_", "mid_", "up_"))}
    known = unet_names(family)
    assert {path.replace(".", "_") for path in own} == set(known.values())
    assert len(known) == len(own)
    assert len([name for name in known if "_attn" in name]) == {"sd1": 128, "sd2": 128, "sdxl": 560}[family]


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_read_by_comfyui_and_a1111(
    family: Family, cell: Cell, networks: dict[Family, tuple[nn.Module, list[nn.Module]]]
) -> None:
    unet, text = networks[family]
    state = random_state(unet, text, cell)
    tensors = to_kohya(state, two_text_encoders=family == "sdxl")
    assert len(state) == NUM_MODULES[family][cell.text]
    assert len(tensors) == 3 * len(state)
    names = {key.partition(".")[0] for key in tensors}
    assert names <= comfyui(family)
    assert not [name for name in names if not a1111_reads(name, family)]
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for key, tensor in tensors.items():
        if not key.endswith(".alpha"):
            assert cell.rank in (tensor.shape[0], tensor.shape[1])
        else:
            assert tensor == cell.alpha


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Any]:
    import diffusers

    root = tmp_path_factory.mktemp("interop")
    for family in FAMILIES:
        make_tiny(family, root / family)
    return {family: getattr(diffusers, TINY[family].pipeline).from_pretrained(root / family) for family in FAMILIES}


QUICK = [Cell(1, 0.5, True), Cell(8, 8.0, False), Cell(64, 32.0, True)]
VERIFIED: set[tuple[Family, Cell]] = set()
LOADED = [pytest.param(cell, marks=[] if cell in QUICK else [pytest.mark.slow]) for cell in CELLS]


@pytest.mark.parametrize("cell", LOADED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_every_cell_without_any_error(
    family: Family, cell: Cell, pipelines: dict[Family, Any], tmp_path: Path, figure: Figure
) -> None:
    verification, num_modules = save_and_verify(pipelines[family], family, cell, tmp_path / "hero.safetensors")
    assert verification.max_error == 0.0
    assert verification.max_effect > 1e-4
    assert verification.num_modules == num_modules
    VERIFIED.add((family, cell))
    figure(
        "Interoperation", f"{len(VERIFIED)} of {len(FAMILIES) * len(set(CELLS))} different cells: greatest difference 0"
    )


def test_a1111_misses_a_layer_of_sdxl_by_diffusers_blocks() -> None:
    """Why files for Stable Diffusion XL are named by the authors' blocks."""
    missed = [n for n in unet_names("sdxl").values() if not a1111_reads(f"lora_unet_{n}", "sdxl")]
    assert missed == ["up_blocks_0_upsamplers_0_conv"]


def test_matrix_covers_all_targets() -> None:
    assert {*UNET_TARGETS, "text_encoder"} == set(TARGETS) - {"attention"}  # of transformers
    assert len(CELLS) == 18
    unet, text = on_meta(TINY["sdxl"])
    assert find_targets(unet, ["text_encoder"], text)[-1].startswith("text_encoder_2.")
