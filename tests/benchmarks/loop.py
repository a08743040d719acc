"""What a whole training loop costs: sdlora's against the diffusers script's as its users run it, and PEFT with caches.

    python tests/benchmarks/loop.py [--base FOLDER | --full-size] [--precision bf16] [--steps 5] [--json]

The three take turns, step by step, in one process, on the same images and the same base: by default one of 27 million
random weights, with --full-size one of Stable Diffusion 1.5's shapes. (a) is the loop of diffusers'
`train_text_to_image_lora.py`: PEFT, VAE and text encoder in every step, autocast. (b) is the same with latents and text
states computed before. sdlora's own caching is timed apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from memory import make_base
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.config.toml import parse_config
from sdlora.data.images import to_tensor
from sdlora.events import StepDone
from sdlora.lora.inject import find_targets
from sdlora.models.architectures import ARCHITECTURES
from sdlora.pocket.architecture import build_scheduler, build_tokenizer
from sdlora.run.folder import RunFolder
from sdlora.run.setup import prepare

TARGETS = ("cross_attention", "self_attention")


class Script:
    """The loop of diffusers' script for LoRAs, a step at a time.

    Args:
        base: A folder in diffusers' layout.
        images: (N, 3, H, W) in [-1, 1].
        captions: One for each.
        dtype: What frozen weights are kept in; adapters are float32 under autocast, as with `--mixed_precision`.
        cached: Whether latents and text states are computed once, before.
    """

    def __init__(self, base: str, images: Tensor, captions: list[str], dtype: torch.dtype, cached: bool) -> None:
        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        for network in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            network.requires_grad_(False)
            nn.Module.to(network, dtype)
        unet = self.pipeline.unet
        paths = find_targets(unet, TARGETS)
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=paths, init_lora_weights="gaussian"))
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.dtype, self.images, self.captions = dtype, images, captions
        self.kept = [self._encode(i) for i in range(len(captions))] if cached else None

    @torch.no_grad()
    def _encode(self, index: int) -> tuple[Tensor, Tensor]:
        vae, tokenizer = self.pipeline.vae, self.pipeline.tokenizer
        latents = vae.encode(self.images[index : index + 1].to(self.dtype)).latent_dist.sample()
        tokens = tokenizer(
            self.captions[index], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        return latents * vae.config.scaling_factor, self.pipeline.text_encoder(tokens.input_ids)[0]

    def step(self, number: int) -> float:
        """One optimizer step; its loss, which the script reads back every time."""
        index = number % len(self.captions)
        latents, text = self.kept[index] if self.kept is not None else self._encode(index)
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            answer = self.pipeline.unet(noisy, timesteps, text, return_dict=False)[0]
            loss = F.mse_loss(answer.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def own_steps(base: str, folder: Path, work: Path, precision: str, edge: int) -> tuple[float, Iterator[StepDone]]:
    """Seconds that caching an image took, and sdlora's own steps as they are asked for."""
    document = {
        "base": {"path": base},
        "data": {"folder": str(folder), "repeats": 100, "resolution_px": edge},
        "lora": {"targets": list(TARGETS)},
        "train": {"device": "cpu", "precision": precision, "log_every_steps": 1},
        "preview": {"enabled": False},
        "cache": {"dir": str(work / "cache")},
    }
    parts = prepare(parse_config(document, name="loop"), RunFolder(work / "run", "loop"))
    begin = time.perf_counter()
    list(parts.data.fill("white"))
    seconds = (time.perf_counter() - begin) / len(parts.data.dataset.examples)
    list(parts.data.fill("white", parts.trainer.schedule.timesteps))
    return seconds, (event for event in parts.trainer.events() if isinstance(event, StepDone))


def make_full_size(folder: Path) -> None:
    """Write a base of random weights in the shapes of Stable Diffusion 1.5, all networks in bfloat16."""
    architecture = ARCHITECTURES["sd1"]
    tokenizer = build_tokenizer(folder / "tokenizer")
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    networks: dict[str, nn.Module] = {
        "vae": AutoencoderKL.from_config(dict(architecture.vae)),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**architecture.text_encoders[0] | ends)),
        "unet": UNet2DConditionModel.from_config(dict(architecture.unet)),
    }
    StableDiffusionPipeline(
        **{name: network.to(torch.bfloat16) for name, network in networks.items()}, tokenizer=tokenizer,
        safety_checker=None, scheduler=build_scheduler(), feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def measure(base: str, work: Path, precision: str, steps: int, edge: int) -> dict[str, list[float]]:
    """Seconds of every step of each loop, in turns; the first turn is left out."""
    folder = work / "set"
    folder.mkdir()
    captions = [f"image number {index}" for index in range(4)]
    images = [Image.effect_noise((edge, edge), 60 + index).convert("RGB") for index in range(4)]
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    images = torch.stack([to_tensor(image) for image in images])
    script = Script(base, images, captions, dtype, cached=False)
    cached = Script(base, images, captions, dtype, cached=True)
    caching, own = own_steps(base, folder, work, precision, edge)
    found: dict[str, list[float]] = {"script": [], "peft cached": [], "sdlora": []}
    for number in range(steps + 1):
        for name, step in (("script", script.step), ("peft cached", cached.step), ("sdlora", lambda _: next(own))):
            begin = time.perf_counter()
            step(number)
            if number > 0:
                found[name].append(time.perf_counter() - begin)
    return found | {"sdlora's caching of an image": [caching]}


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="A folder in diffusers' layout; one of random weights is made if left out.")
    parser.add_argument("--full-size", action="store_true", help="take a base of Stable Diffusion 1.5's shapes")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--edge", type=int, default=256, help="the images' edge in pixels")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = asked.base
        if base is None:
            base = str(work / "base")
            (make_full_size if asked.full_size else make_base)(work / "base")
        found = measure(base, work, asked.precision, asked.steps, asked.edge)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if asked.json:
        print(json.dumps({"seconds": found, "peak_rss_bytes": peak}))
        return
    script = statistics.median(found["script"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"{name}: {middle:.3f} s ({min(values):.3f} to {max(values):.3f}), {middle / script:.2f} of the script")


if __name__ == "__main__":
    main()
