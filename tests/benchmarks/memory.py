"""Plans against what runs really hold: the peak of a whole run's resident memory above the idle process.

    python tests/benchmarks/memory.py [--json]

Each configuration is a process of its own that runs a tiny base first, so that libraries are loaded, and then a base of
27 million random weights from its images to its proven file. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIGURATIONS: dict[str, list[str]] = {
    "as it is": [],
    "batch of 2": ["train.batch_size=2"],
    "batch of 4": ["train.batch_size=4"],
    "192 px": ["data.resolution_px=192"],
    "320 px": ["data.resolution_px=320"],
    "all attention": ['lora.targets=["cross_attention","self_attention"]', "train.batch_size=2"],
    "everything at rank 32": [
        'lora.targets=["cross_attention","self_attention","mlp","projection"]', "lora.rank=32", "train.batch_size=2",
    ],
    "checkpointing": ["train.gradient_checkpointing=true", "train.batch_size=4"],
    "DoRA with an average": ["lora.dora=true", "train.ema_decay=0.9", "train.batch_size=2"],
    "int8 weights": ["base.quantization=int8", "train.batch_size=2"],
    "preservation": [
        "train.preservation_weight=1", 'data.class_words=["cat"]', "data.trigger=zumi", "train.batch_size=2",
    ],
}  # fmt: skip
_MIB = 2**20


def make_base(folder: Path) -> None:
    """Write a Stable Diffusion 1.x of 27 million random weights for 256 px."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdlora.pocket.architecture import build_scheduler, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(96, 192, 384), layers_per_block=1, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=256,
        attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, sample_size=256,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=build_scheduler(), feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def measure(root: Path, number: int, overrides: list[str]) -> dict[str, int]:
    """In this very process: what a run holds at its peak, and what was planned."""
    from sdlora.config.toml import parse_config
    from sdlora.estimate.memory import estimate_memory
    from sdlora.run.estimate import memory_inputs
    from sdlora.run.folder import RunFolder
    from sdlora.run.run import start
    from sdlora.run.setup import prepare

    def config(base: str, *changes: str) -> Any:
        document = {
            "base": {"path": base},
            "data": {"folder": str(root / "set"), "repeats": 1},
            "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
            "preview": {"enabled": False},
            "copycheck": {"enabled": False},
            "cache": {"dir": str(root / f"cache{number}")},
        }
        return parse_config(document, name="memory", overrides=list(changes))

    small = [change for change in overrides if "resolution" not in change]
    for _ in start(config("pocket", "data.resolution_px=64", *small), root / f"small{number}"):
        pass
    asked = config(str(root / "base"), *overrides)
    idle = _reset_peak()
    for _ in start(asked, root / f"run{number}"):
        pass
    measured = _status("VmHWM") - idle
    needed = estimate_memory(memory_inputs(prepare(asked, RunFolder(root / "none", "none")), asked))
    return {"measured": measured, "planned": needed.peak_bytes, **needed.parts}


def _reset_peak() -> int:
    """Bytes that are resident now, from which the peak is counted on."""
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def run_all(names: list[str]) -> dict[str, dict[str, int]]:
    """Every configuration in a process of its own."""
    from PIL import Image

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_base(root / "base")
        (root / "set").mkdir()
        for index in range(4):
            Image.effect_noise((320, 320), 60 + index).convert("RGB").save(root / "set" / f"{index}.png")
            (root / "set" / f"{index}.txt").write_text(f"zumi number {index}")
        # Otherwise the allocator keeps what was freed, more of it the longer a process lives.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
        for number, name in enumerate(names):
            command = [sys.executable, __file__, "--one", str(root), str(number), name]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure everything, or one configuration in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "NUMBER", "NAME"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        root, number, name = asked.one
        print(json.dumps(measure(Path(root), int(number), CONFIGURATIONS[name])))
        return
    found = run_all(list(CONFIGURATIONS))
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    print("| configuration | planned MiB | measured MiB | planned over measured |\n|---|---|---|---|")
    for name, row in found.items():
        share = row["planned"] / row["measured"]
        print(f"| {name} | {row['planned'] / _MIB:.0f} | {row['measured'] / _MIB:.0f} | {share:.3f} |")


if __name__ == "__main__":
    main()
