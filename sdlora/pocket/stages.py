"""What the pretraining of every built-in base shares: stages that can be cut and continued, and the autoencoder's two.

Shapes: B batch, C latent channels, H/W pixels, h/w latents.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from sdlora.common.files import atomic_path
from sdlora.common.seeds import derive, generator
from sdlora.pocket import world
from sdlora.pocket.pen import INK, SIZE_PX, Pen, arc, shrink

CAPTION_DROPOUT = 0.1
VAE_BATCH_SIZE = 16
DOODLES = VAE_BATCH_SIZE // 4
VAE_LEARNING_RATE = 1e-3
DECODER_SEEDS = 20_000_000  # far from the scenes of the other stages
CHECKPOINT_EVERY_STEPS = 200
LOG_EVERY_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """How long a base is trained, and on what."""

    work: Path  # folder for checkpoints and the result
    device: str = "cpu"
    vae_steps: int = 3200
    decoder_steps: int = 2400
    steps: int = 8200
    num_images: int = 40000  # scenes that the denoiser is trained on
    batch_size: int = 32
    learning_rate: float = 1e-3


def doodle(seed: int, size_px: int = SIZE_PX) -> Image.Image:
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
    return shrink(canvas, size_px)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Images of one size to a (B, 3, H, W) tensor in [-1, 1]."""
    width, height = images[0].size
    data = torch.frombuffer(bytearray(b"".join(p.tobytes() for p in images)), dtype=torch.uint8)
    return data.view(len(images), height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate_scale(step: int, total: int, warmup: int = 100, decay_share: float = 0.3) -> float:
    """Warm-up, a plateau, and a linear decay over the last share of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.01, (total - step) / (decay_share * total)))


LossAt = Callable[[int], tuple[Tensor, Callable[[], str]]]
"""From a step's number to its loss, and to what writes the figures to print."""


class MeanLoss:
    """The mean loss of the steps since it was last told."""

    def __init__(self, device: str) -> None:
        self._total = torch.zeros((), device=device)

    def add(self, loss: Tensor) -> None:
        """Count a step's loss."""
        self._total.add_(loss.detach())

    def told(self) -> str:
        """The mean as text, after `LOG_EVERY_STEPS` steps."""
        mean = self._total.item() / LOG_EVERY_STEPS
        self._total.zero_()
        return f"loss {mean:.4f}"


class Stage:
    """A stage of training that can be cut and continued: optimizer, averaged weights, and the checkpoint of both.

    The average's decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.

    Args:
        name: Of the checkpoint, which the stage continues from if it exists.
        networks: By name; all of their weights are saved.
        learning_rate: The peak.
        muon: Train matrices by Muon (Jordan et al. 2024), and the rest by AdamW.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        networks: dict[str, nn.Module],
        trained: list[nn.Module],
        *,
        learning_rate: float = VAE_LEARNING_RATE,
        weight_decay: float = 1e-4,
        decay: float = 0.999,
        muon: bool = False,
    ) -> None:
        self.checkpoint = settings.work / f"{name}_checkpoint.pt"
        self.networks, self.learning_rate, self.decay = networks, learning_rate, decay
        self.parameters = [p for module in trained for p in module.parameters()]
        matrices = _matrices(trained) if muon else []
        rest = [p for p in self.parameters if not any(p is matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        self.average = [p.detach().clone() for p in self.parameters]
        self.first = 0
        if (state := load(self.checkpoint, settings.device)) is not None:
            for network in networks:
                networks[network].load_state_dict(state[network])
            for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(own)
            self.average, self.first = state["average"], state["step"]

    def run(self, num_steps: int, loss_at: LossAt, batch_size: int, log_every: int, decay_share: float = 0.3) -> None:
        """Train up to a number of steps, with a learning rate that falls over the last share of them."""
        start = time.monotonic()
        for step in range(self.first, num_steps):
            loss, figures = loss_at(step)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * learning_rate_scale(step, num_steps, decay_share=decay_share)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(self.decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            if (step + 1) % log_every == 0:
                rate = (step + 1 - self.first) * batch_size / (time.monotonic() - start)
                print(f"{self.checkpoint.stem} {step + 1}/{num_steps} {figures()} {rate:.0f}/s", flush=True)
            if (step + 1) % CHECKPOINT_EVERY_STEPS == 0 or step + 1 == num_steps:
                weights = {name: network.state_dict() for name, network in self.networks.items()}
                optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
                state = {"optimizers": optimizers, "average": self.average, "step": step + 1}
                save(self.checkpoint, weights | state)

    def finish(self, file: Path) -> Path:
        """Write the only network with its averaged weights."""
        copy_average(self.average, self.parameters)
        (network,) = self.networks.values()
        save(file, network.state_dict())
        return file


def _matrices(modules: list[nn.Module]) -> list[Tensor]:
    """The weights of linear layers."""
    return [own.weight for module in modules for own in module.modules() if isinstance(own, nn.Linear)]


@torch.no_grad()
def copy_average(average: list[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    """Replace parameters by their averages."""
    for parameter, value in zip(parameters, average, strict=True):
        parameter.copy_(value)


def autocast(device: str) -> torch.autocast:
    """bfloat16 wherever it is enough."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load(path: Path, device: str) -> dict[str, Any] | None:
    """A state that `save` wrote, or None."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def _psnr(error: Tensor) -> str:
    return f"psnr {-10 * torch.log10(error.pow(2).mean() / 4).item():.2f}"


@dataclass(frozen=True)
class Autoencoder:
    """A base's autoencoder and its two stages of training: the whole one, then the decoder alone.

    Attributes:
        build: Makes the network.
        size_px: Edge of the images that it is trained on.
    """

    settings: Settings
    build: Callable[[], AutoencoderKL]
    size_px: int = SIZE_PX

    def load(self, file: Path, device: str) -> AutoencoderKL:
        """The network with the weights of a file."""
        vae = self.build().to(device)
        vae.load_state_dict(load(file, device))
        return vae

    def _images(self, first: int) -> Tensor:
        """A batch of doodles, a quarter, and of the world's images, as a function of its first image's number."""
        seeds = range(first, first + VAE_BATCH_SIZE)
        doodles = [doodle(s, self.size_px) for s in seeds[:DOODLES]]
        return to_tensor(doodles + [self._render(s) for s in seeds[DOODLES:]])

    def _render(self, seed: int) -> Image.Image:
        return world.render(world.random_scene(seed, unseen=False), self.size_px)

    def train(self) -> Path:
        """Train the autoencoder; returns the file with its averaged weights."""
        settings = self.settings
        done = settings.work / "vae.pt"
        if done.exists():
            return done
        torch.manual_seed(0)
        vae = self.build().to(settings.device)
        stage = Stage(settings, "vae", {"vae": vae}, [vae])

        def loss_at(step: int) -> tuple[Tensor, Callable[[], str]]:
            doodles, recolored, *plain = torch.split(self._images(step * VAE_BATCH_SIZE), DOODLES)
            order = torch.randperm(3, generator=generator(0, "recolour", step))
            pixels = torch.cat([doodles, recolored[:, order], *plain]).to(settings.device)
            with autocast(settings.device):
                posterior = vae.encode(pixels).latent_dist
                restored = vae.decode(posterior.sample(generator(1, "latent", step))).sample
            error = restored.float() - pixels
            # The weight on KL only keeps the latents near a unit normal; it is not a prior to sample from.
            kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
            loss = error.abs().mean() + error.pow(2).mean() + 1e-4 * kl
            return loss, lambda: f"loss {loss.item():.4f} {_psnr(error)} kl {kl.item():.2f}"

        stage.run(settings.vae_steps, loss_at, VAE_BATCH_SIZE, 4 * LOG_EVERY_STEPS)
        return stage.finish(done)

    def finish_decoder(self, file: Path) -> Path:
        """Sharpen the decoder for unchanged latents; returns the file with the finished autoencoder.

        The encoder is frozen, so the denoiser's latents keep their meaning (Stability's ft-MSE autoencoders were made
        so).
        """
        settings = self.settings
        done = settings.work / "vae_finished.pt"
        if done.exists() or settings.decoder_steps == 0:
            return done if done.exists() else file
        vae = self.load(file, settings.device)
        trained: list[nn.Module] = [vae.decoder] if vae.post_quant_conv is None else [vae.decoder, vae.post_quant_conv]
        stage = Stage(settings, "decoder", {"vae": vae}, trained, decay=0.995)

        def loss_at(step: int) -> tuple[Tensor, Callable[[], str]]:
            pixels = self._images(DECODER_SEEDS + step * VAE_BATCH_SIZE).to(settings.device)
            with autocast(settings.device):
                with torch.no_grad():
                    latents = vae.encode(pixels).latent_dist.sample(generator(3, "latent", step))
                restored = vae.decode(latents).sample
            error = restored.float() - pixels
            return error.pow(2).mean() + 0.1 * error.abs().mean(), lambda: _psnr(error[DOODLES:])

        stage.run(settings.decoder_steps, loss_at, VAE_BATCH_SIZE, 4 * LOG_EVERY_STEPS, decay_share=0.7)
        return stage.finish(done)

    @torch.no_grad()
    def encode_world(self, file: Path, *, centered: bool = False) -> dict[str, Any]:
        """Latents of the training scenes, made once and kept on disk.

        Args:
            file: The autoencoder's weights.
            centered: Subtract the latents' mean before they are scaled to unit variance.

        Returns:
            "latents", (N, C, h, w) float16, with their "scaling_factor" and "shift_factor".
        """
        settings = self.settings
        path = settings.work / "latents.pt"
        if (state := load(path, "cpu")) is not None:
            return state
        vae = self.load(file, settings.device).eval()
        latents = []
        for first in range(0, settings.num_images, 100):
            pixels = to_tensor([self._render(s) for s in range(first, min(first + 100, settings.num_images))])
            with autocast(settings.device):
                posterior = vae.encode(pixels.to(settings.device)).latent_dist
            latents.append(posterior.sample(generator(1, "world", first)).float().cpu())
        stacked = torch.cat(latents)
        shift = stacked.mean().item() if centered else 0.0
        scale = 1 / stacked.std().item()
        state = {"latents": ((stacked - shift) * scale).half(), "scaling_factor": scale, "shift_factor": shift}
        save(path, state)
        return state


def parse(description: str | None, kind: type[Settings]) -> tuple[Settings, bool]:
    """The command line's settings, of a kind, and whether only the newest checkpoint is to be written."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    for option in fields(kind)[1:]:
        name = f"--{option.name.replace('_', '-')}"
        parser.add_argument(name, type=type(option.default), default=option.default)
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="write the newest checkpoint as a base model without training further",
    )
    options = vars(parser.parse_args())
    export_only = options.pop("export_only")
    settings = kind(**options)
    settings.work.mkdir(parents=True, exist_ok=True)
    return settings, export_only
