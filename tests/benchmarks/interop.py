"""The interoperability matrix: what every cell's file holds and how exactly diffusers loads it, as the docs' table.

    python tests/benchmarks/interop.py                      small shapes, all 54 cells; per rank alpha 1, r / 2, r
    python tests/benchmarks/interop.py --true sd1 sd2        true shapes, rank 8, alpha 4 (5 GB of memory)
    python tests/benchmarks/interop.py --true sdxl           true widths, one transformer block per attention (7 GB)

Modules and names are counted at true shapes in all of them; the last columns are diffusers' largest error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.readers import a1111_reads, comfyui
from helpers.tiny import TINY, make_tiny, random_networks, small_tokenizer

from sdlora.common.families import Family
from sdlora.lora.inject import LoraState, LoraWeights, by_prefix, find_targets
from sdlora.lora_files.names import to_kohya
from sdlora.lora_files.verify import Verification, verify_lora
from sdlora.lora_files.write import LoraMetadata, save_lora
from sdlora.models.architectures import ARCHITECTURES, Architecture

FAMILIES: list[Family] = ["sd1", "sd2", "sdxl"]
UNET_TARGETS = ["cross_attention", "self_attention", "mlp", "projection", "conv"]


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Attributes:
        rank: Of every module.
        alpha: Of every module.
        text: Whether the text encoders are adapted as well.
    """

    rank: int
    alpha: float
    text: bool

    def __str__(self) -> str:
        return f"rank {self.rank} alpha {self.alpha:g}{' text' if self.text else ''}"


CELLS = [
    Cell(rank, alpha, text) for rank in (1, 8, 64) for alpha in (1.0, rank / 2, float(rank)) for text in (False, True)
]


def on_meta(architecture: Architecture) -> tuple[nn.Module, list[nn.Module]]:
    """A family's networks without numbers."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture.unet)
        text = [kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, architecture.text_encoders, strict=False)]
    return unet, text


def random_state(unet: nn.Module, text_encoders: Sequence[nn.Module], cell: Cell) -> LoraState:
    """A LoRA of random numbers on every target, on the networks' device."""
    targets = [*UNET_TARGETS, *(["text_encoder"] if cell.text else [])]
    networks = by_prefix(unet, text_encoders)
    generator = torch.Generator().manual_seed(1)
    state: LoraState = {}
    for path in find_targets(unet, targets, text_encoders):
        prefix = next((prefix for prefix in networks if prefix and path.startswith(prefix)), "")
        weight = networks[prefix].get_submodule(path.removeprefix(prefix)).weight
        out, *inputs = weight.shape
        shapes = (cell.rank, *inputs), (out, cell.rank, *(1 for _ in inputs[1:]))
        if weight.is_meta:
            down, up = (torch.empty(shape, device="meta") for shape in shapes)
        else:
            down, up = (torch.randn(shape, generator=generator) * 0.05 for shape in shapes)
        state[path] = LoraWeights(down, up, cell.alpha)
    return state


def save_and_verify(pipeline: Any, family: Family, cell: Cell, file: Path) -> tuple[Verification, int]:
    """Write a cell's file, load it back through diffusers, and leave the pipeline as it was."""
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if family == "sdxl" else [])]
    state = random_state(pipeline.unet, encoders, cell)
    metadata = LoraMetadata("hero", "base", _name(family), 64, None, 1, 1, 1.7e9, {})
    save_lora(file, state, metadata=metadata)
    verification = verify_lora(file, state, pipeline)
    pipeline.unload_lora_weights()
    return verification, len(state)


def _name(family: Family) -> str:
    return "stable-diffusion-v2-768-v" if family == "sd2" else ARCHITECTURES[family].modelspec


def true_pipeline(family: Family) -> Any:
    """A pipeline of random weights at true shapes; Stable Diffusion XL with one transformer block per attention."""
    fewer = {"transformer_layers_per_block": [1, 1, 1]} if family == "sdxl" else {}
    parts = random_networks(ARCHITECTURES[family], **fewer)
    parts |= {"tokenizer": small_tokenizer("<|endoftext|>"), "scheduler": diffusers.DDIMScheduler()}
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=parts["tokenizer"], add_watermarker=False)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def counted(family: Family, cell: Cell) -> tuple[int, int, int]:
    """Modules at true shapes, and how many of them ComfyUI and A1111 read."""
    unet, text = on_meta(ARCHITECTURES[family])
    tensors = to_kohya(random_state(unet, text, cell), two_text_encoders=family == "sdxl")
    names = {key.partition(".")[0] for key in tensors}
    known = comfyui(family)
    return len(names), len(names & known), sum(a1111_reads(name, family) for name in names)


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--true", nargs="*", choices=FAMILIES, default=[], help="families at true shapes")
    wanted = parser.parse_args().true
    ranks = (8,) if wanted else (1, 8, 64)
    print("| Base | Networks | Modules | ComfyUI | A1111 |" + "".join(f" rank {rank} |" for rank in ranks))
    print("|---|---|---|---|---|" + "---|" * len(ranks))
    for family in wanted or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            pipeline = true_pipeline(family) if wanted else _small_pipeline(family, Path(folder))
            for text in (True,) if wanted else (False, True):
                cells = [[cell for cell in CELLS if (cell.rank, cell.text) == (rank, text)] for rank in ranks]
                cells = [[Cell(8, 4.0, True)]] if wanted else cells
                errors = [[_error(pipeline, family, cell, Path(folder)) for cell in row] for row in cells]
                told = [
                    ARCHITECTURES[family].title,
                    f"UNet{' and text' if text else ''}",
                    *counted(family, cells[0][0]),
                ]
                print("| " + " | ".join(map(str, [*told, *(", ".join(row) for row in errors)])) + " |", flush=True)


def _small_pipeline(family: Family, folder: Path) -> Any:
    make_tiny(family, folder / family)
    return getattr(diffusers, TINY[family].pipeline).from_pretrained(folder / family)


def _error(pipeline: Any, family: Family, cell: Cell, folder: Path) -> str:
    return f"{save_and_verify(pipeline, family, cell, folder / 'hero.safetensors')[0].max_error:g}"


if __name__ == "__main__":
    main()
