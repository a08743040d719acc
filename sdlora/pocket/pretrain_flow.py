"""Pretrain pocket-flow: `python -m sdlora.pocket.pretrain_flow --work DIR` draws, trains and writes it.

Three stages, as `pretrain` has them: the autoencoder on images of 128 px; text encoder and transformer together on its
latents by flow matching (Lipman et al. 2210.02747), with an exponential moving average and caption dropout for
classifier-free guidance; then the decoder alone. The transformer computes as diffusers' class does, with its rotations
in real numbers and its blocks compiled where torch finds a compiler, which halves the time on a CPU.

Shapes: B batch, C latent channels (16), h/w latents (16), L tokens of one caption, T of one sequence, H heads, d their
width.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Model

from sdlora.common.seeds import derive, generator
from sdlora.pocket import flow_architecture, world
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

UNIFORM_SHARE = 0.25
"""Of the levels that are drawn uniformly, so that the ends of the logit-normal density are learned as well."""


@dataclass(frozen=True)
class FlowSettings(Settings):
    """How long pocket-flow is trained, and on what."""

    vae_steps: int = 6400
    decoder_steps: int = 2000
    steps: int = 10000
    num_images: int = 30000


def autoencoder(settings: Settings) -> Autoencoder:
    """Pocket-flow's autoencoder and its training."""
    return Autoencoder(settings, flow_architecture.build_vae, flow_architecture.SIZE_PX)


class RealRotations:
    """Z-Image's rotary positions as pairs of real numbers, which torch can compile: (T, d), cosines, then sines."""

    def __init__(self, embedder: Callable[[Tensor], Tensor]) -> None:
        self._embedder = embedder

    def __call__(self, ids: Tensor) -> Tensor:
        """Positions, (T, 3), to rotations, (T, d)."""
        rotations = self._embedder(ids)
        return torch.cat([rotations.real, rotations.imag], dim=-1)


class RealAttention:
    """Z-Image's attention, with the rotations that `RealRotations` gives."""

    def __call__(
        self, attn: Attention, x: Tensor, *_: Any, attention_mask: Tensor | None, freqs_cis: Tensor, **__: Any
    ) -> Tensor:
        """(B, T, H d) to the attention's output of the same shape."""
        query, key, value = (layer(x).view(*x.shape[:2], attn.heads, -1) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _rotated(attn.norm_q(query), freqs_cis), _rotated(attn.norm_k(key), freqs_cis)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return output


def _rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """Pairs of neighbours in (B, T, H, d), turned by angles whose cosines and sines are (B, T, d)."""
    cos, sin = rotations.unsqueeze(2).to(x.dtype).chunk(2, dim=-1)
    even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def make_fast(network: ZImageTransformer2DModel, *, compiled: bool) -> None:
    """Make a Z-Image transformer train faster on a CPU, in place; it computes as before up to rounding."""
    network.rope_embedder = RealRotations(network.rope_embedder)
    for block in [*network.noise_refiner, *network.context_refiner, *network.layers]:
        block.attention.set_processor(RealAttention())
        if compiled:
            block.compile(dynamic=False)


def encode(tokenizer: Qwen2Tokenizer, encoder: Qwen3Model, captions: list[str], device: str) -> list[Tensor]:
    """Captions to their states, (L, D) each, as Z-Image's pipeline reads them."""
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True
        )
        for caption in captions
    ]
    tokens = tokenizer(asked, padding=True, return_tensors="pt").to(device)
    states = encoder(**tokens, output_hidden_states=True).hidden_states[-2]
    return [own[:length] for own, length in zip(states, tokens.attention_mask.sum(dim=1).tolist(), strict=True)]


def levels(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels s in (0, 1), (count,): spread quantiles, most of them of the shifted logit-normal density.

    Source: Esser et al. 2403.03206, equations 19 and 23.
    """
    quantiles = (torch.rand(1, generator=generator) + torch.arange(count) / count) % 1
    quantiles = quantiles.clamp(1e-4, 1 - 1e-4)
    normal = torch.sigmoid(torch.special.ndtri(quantiles) + log(flow_architecture.SHIFT))
    uniform = torch.rand(count, generator=generator) < UNIFORM_SHARE
    return torch.where(uniform, quantiles, normal)


def train_transformer(settings: Settings, vae_file: Path, *, compiled: bool = True) -> None:
    """Train text encoder and transformer together, on the latents of the encoder in `vae_file`."""
    latents: Tensor = autoencoder(settings).encode_world(vae_file, centered=True)["latents"]
    torch.manual_seed(1)
    tokenizer = flow_architecture.build_tokenizer()
    text_encoder = flow_architecture.build_text_encoder(tokenizer).to(settings.device)
    transformer = flow_architecture.build_transformer().to(settings.device)
    networks: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder}
    stage = Stage(
        settings, "transformer", networks, [transformer, text_encoder], learning_rate=settings.learning_rate,
        weight_decay=1e-2, muon=True,
    )  # fmt: skip
    make_fast(transformer, compiled=compiled)
    mean_loss = MeanLoss(settings.device)

    def loss_at(step: int) -> tuple[Tensor, Callable[[], str]]:
        draw = generator(2, "batch", step)
        chosen = torch.randint(len(latents), (settings.batch_size,), generator=draw)
        x = latents[chosen].float()
        noise = torch.randn(x.shape, generator=draw)
        s = levels(settings.batch_size, draw)
        rng = random.Random(derive(2, "caption", step))
        scenes = [world.random_scene(int(i), unseen=False) for i in chosen]
        captions = ["" if rng.random() < CAPTION_DROPOUT else world.training_caption(scene, rng) for scene in scenes]
        x, noise, s = x.to(settings.device), noise.to(settings.device), s.to(settings.device)
        # Liu et al. 2209.03003, equation 1, with noise at s = 1; the network is told 1 - s and predicts x - noise.
        noisy = torch.lerp(x, noise, s.view(-1, 1, 1, 1))
        with autocast(settings.device):
            states = encode(tokenizer, text_encoder, captions, settings.device)
            predicted = transformer(list(noisy.unsqueeze(2)), 1 - s, states, return_dict=False)[0]
        loss = (torch.stack(predicted).squeeze(2).float() - (x - noise)).pow(2).mean()
        mean_loss.add(loss)
        return loss, mean_loss.told

    stage.run(settings.steps, loss_at, settings.batch_size, LOG_EVERY_STEPS)


def export_pocket_flow(settings: Settings, vae_file: Path, folder: Path) -> None:
    """Write the averaged weights of the newest checkpoint as a diffusers folder."""
    maker = autoencoder(settings)
    data, state = maker.encode_world(vae_file, centered=True), load(settings.work / "transformer_checkpoint.pt", "cpu")
    assert state is not None, "there is a checkpoint once train_transformer has run"
    tokenizer = flow_architecture.build_tokenizer()
    text_encoder = flow_architecture.build_text_encoder(tokenizer)
    transformer = flow_architecture.build_transformer()
    copy_average(state["average"], [*transformer.parameters(), *text_encoder.parameters()])
    vae = maker.load(vae_file, "cpu")
    # The text encoder stays in float32, as pocket's.
    transformer.half()
    vae.half()
    vae.register_to_config(scaling_factor=float(data["scaling_factor"]), shift_factor=float(data["shift_factor"]))
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer}
    ZImagePipeline(**parts, scheduler=flow_architecture.build_scheduler()).save_pretrained(folder)


def main() -> None:
    """Parse the command line and run the stages."""
    settings, export_only = parse(__doc__, FlowSettings)
    maker = autoencoder(settings)
    vae_file = maker.train()
    if not export_only:
        train_transformer(settings, vae_file)
    export_pocket_flow(settings, maker.finish_decoder(vae_file), settings.work / "pocket-flow")


if __name__ == "__main__":
    main()
