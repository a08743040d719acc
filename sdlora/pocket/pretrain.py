"""Pretrain pocket: `python -m sdlora.pocket.pretrain --work DIR` draws, trains and writes the built-in base model.

Three stages, each with checkpoints in the work folder, so that an interrupted command can be run again: the autoencoder
on images; text encoder and UNet together on its latents (Rombach et al. 2112.10752), with an exponential moving
average and caption dropout for classifier-free guidance (Ho & Salimans 2207.12598); then the decoder alone.

Shapes: B batch, H/W pixels (64), h/w latents (16), L tokens (77).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from sdlora.common.seeds import derive, generator
from sdlora.pocket import architecture, world
from sdlora.pocket.stages import (
    CAPTION_DROPOUT,
    LOG_EVERY_STEPS,
    Autoencoder,
    MeanLoss,
    Settings,
    Stage,
    autocast,
    copy_average,
    load,
    parse,
)

SNR_CAP = 5.0


def autoencoder(settings: Settings) -> Autoencoder:
    """Pocket's autoencoder and its training."""
    return Autoencoder(settings, architecture.build_vae)


def train_unet(settings: Settings, vae_file: Path) -> None:
    """Train text encoder and UNet together, on the latents of the encoder in `vae_file`."""
    data = autoencoder(settings).encode_world(vae_file)
    latents: Tensor = data["latents"]
    torch.manual_seed(1)
    tokenizer = architecture.build_tokenizer(settings.work / "tokenizer")
    text_encoder = architecture.build_text_encoder(tokenizer).to(settings.device)
    unet = architecture.build_unet().to(settings.device, memory_format=torch.channels_last)
    networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    stage = Stage(
        settings, "unet", networks, [unet, text_encoder], learning_rate=settings.learning_rate, weight_decay=1e-2
    )
    alphas_cumprod = architecture.build_scheduler().alphas_cumprod.to(settings.device)
    mean_loss = MeanLoss(settings.device)

    def loss_at(step: int) -> tuple[Tensor, Callable[[], str]]:
        draw = generator(2, "batch", step)
        chosen = torch.randint(len(latents), (settings.batch_size,), generator=draw)
        x = latents[chosen].float()
        noise = torch.randn(x.shape, generator=draw)
        t = (torch.rand(1, generator=draw) + torch.arange(settings.batch_size) / settings.batch_size) % 1 * 1000
        x, noise, t = x.to(settings.device), noise.to(settings.device), t.long().to(settings.device)
        rng = random.Random(derive(2, "caption", step))
        scenes = [world.random_scene(int(i), unseen=False) for i in chosen]
        captions = ["" if rng.random() < CAPTION_DROPOUT else world.training_caption(scene, rng) for scene in scenes]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        with autocast(settings.device):
            states = text_encoder(ids.to(settings.device)).last_hidden_state
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, states).sample
        snr = (alpha / (1 - alpha)).flatten()
        # Min-SNR-gamma weighting for epsilon prediction (Hang et al. 2303.09556).
        weight = snr.clamp(max=SNR_CAP) / snr
        loss = (weight * (predicted.float() - noise).pow(2).mean(dim=(1, 2, 3))).mean()
        mean_loss.add(loss)
        return loss, mean_loss.told

    stage.run(settings.steps, loss_at, settings.batch_size, LOG_EVERY_STEPS)


def export_pocket(settings: Settings, vae_file: Path, folder: Path) -> None:
    """Write the averaged weights of the newest checkpoint as a diffusers folder."""
    maker = autoencoder(settings)
    data, state = maker.encode_world(vae_file), load(settings.work / "unet_checkpoint.pt", "cpu")
    assert state is not None, "there is a checkpoint once train_unet has run"
    tokenizer = architecture.build_tokenizer(settings.work / "tokenizer")
    text_encoder, unet = architecture.build_text_encoder(tokenizer), architecture.build_unet()
    copy_average(state["average"], [*unet.parameters(), *text_encoder.parameters()])
    vae = maker.load(vae_file, "cpu")
    # The text encoder stays in float32: transformers loads a model in the type it was saved in, and a half-precision
    # one would not fit the float32 UNet of a plain `from_pretrained`.
    unet.half()
    vae.half()
    vae.register_to_config(scaling_factor=float(data["scaling_factor"]))
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, scheduler=architecture.build_scheduler(), **absent)
    pipeline.save_pretrained(folder)
    architecture.build_tokenizer(folder / "tokenizer")


def main() -> None:
    """Parse the command line and run the stages."""
    settings, export_only = parse(__doc__, Settings)
    maker = autoencoder(settings)
    vae_file = maker.train()
    if not export_only:
        train_unet(settings, vae_file)
    export_pocket(settings, maker.finish_decoder(vae_file), settings.work / "pocket")


if __name__ == "__main__":
    main()
