"""How well a built-in base draws what it is asked for, in combinations that it was never trained on.

python tests/benchmarks/pocket_quality.py --num-prompts 500 --json
python tests/benchmarks/pocket_quality.py --base sdlora/pocket/flow_weights --num-prompts 500 --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from classifier import Judge, load_or_train, look
from generate import GUIDANCE, draw, load_pipeline, save_sheet, wilson

from sdlora.common.bundled import pocket_folder
from sdlora.pocket import stages, world

PROMPT_SEEDS, RENDER_SEEDS = 70_000_000, 80_000_000


def unseen_scenes(count: int) -> list[world.Scene]:
    """Scenes whose kind, colour and place never met in the base's training."""
    return [world.random_scene(PROMPT_SEEDS + index, unseen=True) for index in range(count)]


def attribute_accuracy(pipeline: Any, judge: Judge, scenes: list[world.Scene], guidance: float) -> dict[str, float]:
    """Shares of images in which kind, colour and place are what was asked for."""
    seen = look(judge, draw(pipeline, [world.caption(scene) for scene in scenes], guidance=guidance))
    pairs = list(zip(scenes, seen, strict=True))
    return {
        name: sum(getattr(scene, name) == getattr(verdict, name) for scene, verdict in pairs) / len(pairs)
        for name in ("kind", "color", "place")
    }


@torch.no_grad()
def reconstruction_psnr(vae: Any, count: int = 200) -> float:
    """Mean PSNR in dB of the VAE on fresh renders, from pixels in [0, 1]."""
    edge_px, values = vae.config.sample_size, []
    for first in range(RENDER_SEEDS, RENDER_SEEDS + count, 50):
        scenes = [world.random_scene(seed) for seed in range(first, first + 50)]
        pixels = stages.to_tensor([world.render(scene, edge_px) for scene in scenes])
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * ((restored - pixels) / 2).pow(2).mean(dim=(1, 2, 3)).log10())
    return float(torch.cat(values).mean())


def measure(base: Path, judge: Judge, num_prompts: int, guidance: float) -> dict[str, Any]:
    """All figures of the base's card."""
    pipeline = load_pipeline(base)
    accuracy = attribute_accuracy(pipeline, judge, unseen_scenes(num_prompts), guidance)
    return {
        "num_prompts": num_prompts,
        "guidance": guidance,
        "accuracy": accuracy,
        "interval": {name: wilson(share, num_prompts) for name, share in accuracy.items()},
        "psnr_db": round(reconstruction_psnr(pipeline.vae), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=pocket_folder())
    parser.add_argument("--judge", type=Path, help="where the judge is kept between calls")
    parser.add_argument("--num-prompts", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="also write a sheet of samples")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.base, load_or_train(arguments.judge), arguments.num_prompts, arguments.guidance)
    if arguments.sheet:
        prompts = [world.caption(scene) for scene in unseen_scenes(8)]
        save_sheet(load_pipeline(arguments.base), prompts, arguments.sheet, guidance=arguments.guidance)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, share in result["accuracy"].items():
        low, high = result["interval"][name]
        print(f"{name:<6} {share:6.1%}   (95 %: {low:.1%} to {high:.1%})")
    print(f"reconstruction {result['psnr_db']} dB")


if __name__ == "__main__":
    main()
