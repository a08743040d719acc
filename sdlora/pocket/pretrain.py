"""Makes pocket from nothing: `python -m sdlora.pocket.pretrain --work DIR` draws, trains and writes the base.

Three stages, each with checkpoints in the work folder, so that the command can be cut and given again: the
autoencoder on images, text encoder and UNet together on its latents (Rombach et al. 2112.10752), with an
exponential moving average and caption dropout for classifier-free guidance (Ho & Salimans 2207.12598), and the
decoder once more alone.

Shapes: B batch, H/W pixels (64), h/w latents (16), L tokens (77).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from sdlora.common.files import atomic_path
from sdlora.common.seeds import derive, generator
from sdlora.pocket import architecture, world
from sdlora.pocket.pen import INK, SIZE_PX, Pen, arc, shrink

CAPTION_DROPOUT = 0.1
VAE_BATCH_SIZE = 16
VAE_LEARNING_RATE = 1e-3
DECODER_SEEDS = 20_000_000  # far from the scenes of the other stages
SNR_CAP = 5.0
CHECKPOINT_EVERY_STEPS = 200
LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """How long and on what pocket is trained."""

    work: Path
    device: str
    vae_steps: int
    decoder_steps: int
    steps: int
    num_images: int
    batch_size: int
    learning_rate: float


def doodle(seed: int) -> Image.Image:
    """An image outside the world (any shapes in any colours), so that the autoencoder can hold new subjects."""
    rng = random.Random(derive(0, "doodle", seed))
    canvas = world.render_canvas(world.random_scene(seed, unseen=False))
    for _ in range(rng.randint(3, 8)):
        color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        center = (rng.uniform(4, 60), rng.uniform(4, 60))
        outline = rng.choice([None, INK, (255, 255, 255), color])
        pen = Pen(canvas, center, rng.uniform(3, 26), color, rng.uniform(0, 6.3), outline=outline)
        shape = rng.randrange(4)
        if shape == 0:
            pen.oval(0, 0, rng.uniform(0.2, 1), rng.uniform(0.2, 1))
        elif shape == 1:
            pen.polygon([(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(rng.randint(3, 6))])
        elif shape == 2:
            pen.line(arc(0, 0, 1, 1, rng.uniform(0, 180), rng.uniform(180, 360)), color, rng.uniform(0.8, 3))
        else:
            pen.line([(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(3)], color, rng.uniform(0.8, 3))
    return shrink(canvas)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Images to a (B, 3, H, W) tensor in [-1, 1]."""
    data = torch.frombuffer(bytearray(b"".join(p.tobytes() for p in images)), dtype=torch.uint8)
    return data.view(len(images), SIZE_PX, SIZE_PX, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _save(path: Path, state: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load(path: Path, device: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def learning_rate_scale(step: int, total: int, warmup: int = 100, decay_share: float = 0.3) -> float:
    """Warm-up, a plateau, and a linear way down over the last share of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.01, (total - step) / (decay_share * total)))


class Average:
    """An exponential moving average of parameters, short at first and longer with every step.

    Source: the warm-up min(decay, (1 + step) / (10 + step)) is the common one of TensorFlow's averages.
    """

    def __init__(self, modules: list[nn.Module], decay: float = 0.999) -> None:
        self.decay = decay
        self.sources = [p for module in modules for p in module.parameters()]
        self.values = [p.detach().clone() for p in self.sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.sources], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the averaged values in the place of the trained ones."""
        for parameter, value in zip(self.sources, self.values, strict=True):
            parameter.copy_(value)


# --- Stage 1: the autoencoder -----------------------------------------------------------------------------------


def _vae_batches(plan: Plan, first_step: int) -> Iterator[Tensor]:
    """Batches as a function of the step: half the world as it is, a quarter recoloured, a quarter doodles."""
    for step in range(first_step, plan.vae_steps):
        seeds = [step * VAE_BATCH_SIZE + i for i in range(VAE_BATCH_SIZE)]
        quarter = VAE_BATCH_SIZE // 4
        plain = to_tensor([world.render(world.random_scene(s, unseen=False)) for s in seeds[quarter:]])
        recolored = plain[:quarter]
        order = torch.randperm(3, generator=generator(0, "recolour", step))
        yield torch.cat([to_tensor([doodle(s) for s in seeds[:quarter]]), recolored[:, order], plain[quarter:]])


def train_vae(plan: Plan) -> Path:
    """Train the autoencoder; returns the file with its averaged weights."""
    done, checkpoint = plan.work / "vae.pt", plan.work / "vae_checkpoint.pt"
    if done.exists():
        return done
    torch.manual_seed(0)
    vae = architecture.build_vae().to(plan.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average([vae])
    first = 0
    if (state := _load(checkpoint, plan.device)) is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, first = state["average"], state["step"]
    start = time.monotonic()
    for step, pixels in enumerate(_vae_batches(plan, first), start=first):
        pixels = pixels.to(plan.device)
        for group in optimizer.param_groups:
            group["lr"] = VAE_LEARNING_RATE * learning_rate_scale(step, plan.vae_steps)
        with _autocast(plan.device):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample(generator(1, "latent", step))).sample
        error = restored.float() - pixels
        # The weight on KL only keeps the latents near a unit normal; it is not a prior to sample from.
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.abs().mean() + error.pow(2).mean() + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(step)
        if (step + 1) % (4 * LOG_EVERY_STEPS) == 0:
            psnr = -10 * torch.log10(error.pow(2).mean() / 4).item()
            rate = (step + 1 - first) * VAE_BATCH_SIZE / (time.monotonic() - start)
            print(f"vae {step + 1}/{plan.vae_steps} loss {loss.item():.4f} psnr {psnr:.2f} kl {kl.item():.2f} "
                  f"{rate:.0f}/s", flush=True)  # fmt: skip
        if (step + 1) % CHECKPOINT_EVERY_STEPS == 0:
            _save(checkpoint, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(),
                               "average": average.values, "step": step + 1})  # fmt: skip
    average.copy_to_parameters()
    _save(done, vae.state_dict())
    return done


def finish_decoder(plan: Plan, vae_file: Path) -> Path:
    """Sharpen the decoder for latents that stay as they are; returns the file with the finished autoencoder.

    The encoder is frozen, so the UNet's latents keep their meaning and this may run before or after stage 2
    (Stability's ft-MSE autoencoders were made so).
    """
    done, checkpoint = plan.work / "vae_finished.pt", plan.work / "decoder_checkpoint.pt"
    if done.exists() or plan.decoder_steps == 0:
        return done if done.exists() else vae_file
    vae = architecture.build_vae().to(plan.device)
    vae.load_state_dict(torch.load(vae_file, map_location=plan.device, weights_only=True))
    trained: list[nn.Module] = [vae.decoder, vae.post_quant_conv]
    parameters = [p for module in trained for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average(trained, decay=0.995)
    first = 0
    if (state := _load(checkpoint, plan.device)) is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, first = state["average"], state["step"]
    for step in range(first, plan.decoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = VAE_LEARNING_RATE * learning_rate_scale(step, plan.decoder_steps, decay_share=0.7)
        seeds = [DECODER_SEEDS + step * VAE_BATCH_SIZE + i for i in range(VAE_BATCH_SIZE)]
        quarter = VAE_BATCH_SIZE // 4
        images = [world.render(world.random_scene(s, unseen=False)) for s in seeds[quarter:]]
        pixels = to_tensor([doodle(s) for s in seeds[:quarter]] + images).to(plan.device)
        with _autocast(plan.device):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample(generator(3, "latent", step))
            restored = vae.decode(latents).sample
        error = restored.float() - pixels
        loss = error.pow(2).mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        if (step + 1) % (4 * LOG_EVERY_STEPS) == 0:
            psnr = -10 * torch.log10(error[quarter:].pow(2).mean() / 4).item()
            print(f"decoder {step + 1}/{plan.decoder_steps} psnr {psnr:.2f}", flush=True)
            _save(checkpoint, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(),
                               "average": average.values, "step": step + 1})  # fmt: skip
    average.copy_to_parameters()
    _save(done, vae.state_dict())
    return done


# --- Stage 2: text encoder and UNet -----------------------------------------------------------------------------


@torch.no_grad()
def encode_world(plan: Plan, vae_file: Path) -> dict[str, Any]:
    """Latents of the training scenes, scaled to unit variance, with the scale; made once and kept on disk."""
    path = plan.work / "latents.pt"
    if (state := _load(path, "cpu")) is not None:
        return state
    vae = architecture.build_vae().to(plan.device).eval()
    vae.load_state_dict(torch.load(vae_file, map_location=plan.device, weights_only=True))
    latents = []
    for first in range(0, plan.num_images, 100):
        scenes = [world.random_scene(s, unseen=False) for s in range(first, min(first + 100, plan.num_images))]
        with _autocast(plan.device):
            posterior = vae.encode(to_tensor([world.render(s) for s in scenes]).to(plan.device)).latent_dist
        latents.append(posterior.sample(generator(1, "world", first)).float().cpu())
    stacked = torch.cat(latents)
    scale = 1 / stacked.std().item()
    state = {"latents": (stacked * scale).half(), "scaling_factor": scale}
    _save(path, state)
    return state


def train_unet(plan: Plan, vae_file: Path) -> None:
    """Train text encoder and UNet together, on the latents of the encoder in `vae_file`."""
    checkpoint = plan.work / "unet_checkpoint.pt"
    data = encode_world(plan, vae_file)
    latents: Tensor = data["latents"]
    torch.manual_seed(1)
    tokenizer = architecture.build_tokenizer(plan.work / "tokenizer")
    text_encoder = architecture.build_text_encoder(tokenizer).to(plan.device)
    unet = architecture.build_unet().to(plan.device, memory_format=torch.channels_last)
    modules: list[nn.Module] = [unet, text_encoder]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    average = Average(modules)
    alphas_cumprod = architecture.build_scheduler().alphas_cumprod.to(plan.device)
    first = 0
    if (state := _load(checkpoint, plan.device)) is not None:
        unet.load_state_dict(state["unet"])
        text_encoder.load_state_dict(state["text_encoder"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, first = state["average"], state["step"]
    start, total_loss = time.monotonic(), torch.zeros((), device=plan.device)
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_scale(step, plan.steps)
        draw = generator(2, "batch", step)
        chosen = torch.randint(len(latents), (plan.batch_size,), generator=draw)
        x = latents[chosen].float()
        noise = torch.randn(x.shape, generator=draw)
        t = (torch.rand(1, generator=draw) + torch.arange(plan.batch_size) / plan.batch_size) % 1 * 1000
        x, noise, t = x.to(plan.device), noise.to(plan.device), t.long().to(plan.device)
        rng = random.Random(derive(2, "caption", step))
        scenes = [world.random_scene(int(i), unseen=False) for i in chosen]
        captions = ["" if rng.random() < CAPTION_DROPOUT else world.training_caption(scene, rng) for scene in scenes]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        with _autocast(plan.device):
            states = text_encoder(ids.to(plan.device)).last_hidden_state
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, states).sample
        snr = (alpha / (1 - alpha)).flatten()
        # Min-SNR-gamma weighting for epsilon prediction (Hang et al. 2303.09556).
        weight = snr.clamp(max=SNR_CAP) / snr
        loss = (weight * (predicted.float() - noise).pow(2).mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        total_loss += loss.detach()
        if (step + 1) % LOG_EVERY_STEPS == 0:
            rate = (step + 1 - first) * plan.batch_size / (time.monotonic() - start)
            print(f"unet {step + 1}/{plan.steps} loss {total_loss.item() / LOG_EVERY_STEPS:.4f} {rate:.0f}/s",
                  flush=True)  # fmt: skip
            total_loss.zero_()
        if (step + 1) % CHECKPOINT_EVERY_STEPS == 0 or step + 1 == plan.steps:
            _save(checkpoint, {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict(),
                               "optimizer": optimizer.state_dict(), "average": average.values,
                               "step": step + 1})  # fmt: skip


def export_pocket(plan: Plan, vae_file: Path, folder: Path) -> None:
    """Write the averaged weights of the newest checkpoint as a diffusers folder."""
    data, state = encode_world(plan, vae_file), _load(plan.work / "unet_checkpoint.pt", "cpu")
    assert state is not None, "there is a checkpoint once train_unet has run"
    tokenizer = architecture.build_tokenizer(plan.work / "tokenizer")
    text_encoder, unet, vae = (
        architecture.build_text_encoder(tokenizer),
        architecture.build_unet(),
        architecture.build_vae(),
    )
    average = Average([unet, text_encoder])
    average.values = state["average"]
    average.copy_to_parameters()
    vae.load_state_dict(torch.load(vae_file, map_location="cpu", weights_only=True))
    # The text encoder stays in float32: transformers loads a model in the type it was saved in, and a half-precision
    # one would not fit the float32 UNet of a plain `from_pretrained`.
    unet.half()
    vae.half()
    vae.register_to_config(scaling_factor=float(data["scaling_factor"]))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=architecture.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    architecture.build_tokenizer(folder / "tokenizer")


def main() -> None:
    """Parse the command line and run both stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vae-steps", type=int, default=3200)
    parser.add_argument("--decoder-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=8200)
    parser.add_argument("--num-pictures", type=int, default=40000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--export-only", action="store_true", help="train no further: write the newest checkpoint as a base"
    )
    arguments = parser.parse_args()
    plan = Plan(
        work=arguments.work,
        device=arguments.device,
        vae_steps=arguments.vae_steps,
        decoder_steps=arguments.decoder_steps,
        steps=arguments.steps,
        num_images=arguments.num_images,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )
    plan.work.mkdir(parents=True, exist_ok=True)
    vae_file = train_vae(plan)
    if not arguments.export_only:
        train_unet(plan, vae_file)
    export_pocket(plan, finish_decoder(plan, vae_file), plan.work / "pocket")


if __name__ == "__main__":
    main()
