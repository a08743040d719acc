"""The proof that a written file is the trained adapter: diffusers loads it, and both answer the same.

Floor 2. Shapes: B batch, C latent channels, h/w latents, L tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from sdlora import seeds
from sdlora.errors import ExportError
from sdlora.lora.inject import LoraState, inject_state

_TIMESTEPS = (20, 400, 950)


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
        max_error: Greatest difference between the trained adapter's answers and the loaded file's.
        max_effect: Greatest difference that the adapter makes to the base's answers.
        num_modules: How many modules diffusers put an adapter on.
    """

    max_error: float
    max_effect: float
    num_modules: int


@torch.no_grad()
def prove_lora(path: Path, state: LoraState, pipeline: StableDiffusionPipeline) -> Proof:
    """Load a file through diffusers and compare it with the weights it was written from.

    Args:
        path: The LoRA file.
        state: The trained weights, by module path of the UNet.
        pipeline: A freshly loaded base in float32; its UNet is used up (it keeps diffusers' adapter).

    Returns:
        The figures; `max_error` is 0.

    Raises:
        ExportError: diffusers cannot load the file, puts adapters on other modules, or any answer differs.
    """
    unet: UNet2DConditionModel = pipeline.unet
    plain = _answers(unet)
    adapter = inject_state(unet, state)
    trained = _answers(unet)
    adapter.remove()
    try:
        with _quiet():
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ExportError(f"diffusers cannot load {path}: {error}") from error
    _align(unet)
    loaded = _answers(unet)
    found = {name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A")}
    if found != set(state):
        missing = sorted(set(state) ^ found)
        raise ExportError(f"{path}: diffusers loaded other modules than were trained, among them {missing[0]}.")
    proof = Proof(
        max_error=float((trained - loaded).abs().max()),
        max_effect=float((trained - plain).abs().max()),
        num_modules=len(found),
    )
    if proof.max_error != 0.0:
        raise ExportError(f"{path} does not reproduce the trained model: it differs by up to {proof.max_error:g}.")
    return proof


def _answers(unet: UNet2DConditionModel) -> Tensor:
    """The UNet's answers to fixed latents and text states at three noise levels, (3, C, h, w)."""
    size = min(16, unet.config.sample_size)
    batch = len(_TIMESTEPS)
    latents = seeds.normal((batch, unet.config.in_channels, size, size), 0, "proof latents")
    text = seeds.normal((batch, 77, unet.config.cross_attention_dim), 0, "proof text")
    answer: Tensor = unet(latents, torch.tensor(_TIMESTEPS), text, return_dict=False)[0]
    return answer


def _align(unet: UNet2DConditionModel) -> None:
    """Move the loaded weights out of the file's memory map.

    There they stand at any address, and products with unaligned numbers are summed in another order: the same
    weights would give answers that differ in the last bit.
    """
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers warns of the text encoder's missing part in a UNet-only file; that is what was trained."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
