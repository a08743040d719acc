"""Whether a LoRA taught the base its character, and whether the base still knows the rest.

python tests/benchmarks/learning.py runs/quickstart/quickstart.safetensors --json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from classifier import Judge, load_or_train, look
from generate import GUIDANCE, draw, load_pipeline, save_sheet, wilson
from pocket_quality import attribute_accuracy, unseen_scenes

from sdlora.common.bundled import pocket_folder
from sdlora.pocket import sets, world


def character_prompts(count: int) -> list[str]:
    """Prompts with the trigger that are no caption of the set: other sizes, positions and places together."""
    captions = {
        sets.character_caption(*sets.character_scene(i)) for i in range(sets.NUM_TRAINING + sets.NUM_VALIDATION)
    }
    rng = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < count:
        scene = world.Scene(
            "zumi", "white", "plain", rng.choice(list(world.SIZES)), rng.choice(list(world.POSITIONS)),
            rng.choice(list(world.PLACES)), 0,
        )  # fmt: skip
        prompt = sets.character_caption(scene, rng.choice(sets.POSES))
        if prompt not in captions:
            prompts.append(prompt)
    return prompts


def measure(lora: Path, base: Path, judge: Judge, num_images: int, guidance: float) -> dict[str, Any]:
    """Share of images accepted as the character, and the base's own accuracy, without and with the LoRA."""
    pipeline = load_pipeline(base)
    prompts, scenes = character_prompts(num_images), unseen_scenes(num_images)
    shares: list[float] = []
    accuracies: list[dict[str, float]] = []
    for file in (None, lora):
        if file is not None:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
        seen = look(judge, draw(pipeline, prompts, guidance=guidance))
        shares.append(sum(verdict.kind == "zumi" for verdict in seen) / num_images)
        accuracies.append(attribute_accuracy(pipeline, judge, scenes, guidance))
    before, after = accuracies
    return {
        "num_pictures": num_images,
        "guidance": guidance,
        "base_share": shares[0],
        "lora_share": shares[1],
        "lora_share_interval": wilson(shares[1], num_images),
        "base_accuracy": before,
        "lora_accuracy": after,
        "kept_ratio": {name: after[name] / max(before[name], 1e-9) for name in before},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base", type=Path, default=pocket_folder())
    parser.add_argument("--judge", type=Path, help="where the judge is kept between calls")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sheet", type=Path, help="also write a sheet of samples")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    judge = load_or_train(arguments.judge)
    result = measure(arguments.lora, arguments.base, judge, arguments.num_images, arguments.guidance)
    if arguments.sheet:
        pipeline = load_pipeline(arguments.base)
        pipeline.load_lora_weights(arguments.lora.parent, weight_name=arguments.lora.name)
        save_sheet(pipeline, character_prompts(8), arguments.sheet, guidance=arguments.guidance)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"accepted as zumi      base {result['base_share']:6.1%}   with the LoRA {result['lora_share']:6.1%}")
    for name, share in result["base_accuracy"].items():
        print(f"other prompts: {name:<6} base {share:6.1%}   with the LoRA {result['lora_accuracy'][name]:6.1%}")


if __name__ == "__main__":
    main()
