"""The proof that a written file is the trained adapter: diffusers loads it, and both answer the same.

Shapes: B batch, C latent channels, h/w latents, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from sdlora.common import seeds
from sdlora.errors import ExportError
from sdlora.lora.inject import LoraState, inject_state
from sdlora.lora.targets import NETWORKS, by_prefix
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.names import file_form, rounded

VERIFY_TIMESTEPS = (20, 400, 950)
VERIFY_LATENT_EDGE = 16
"""The edge of the latents, unless the base is smaller."""


@dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        max_error: Greatest difference between the answers of the weights that were written and of the loaded file.
        max_effect: Greatest difference that the adapter makes to the base's answers.
        num_modules: How many modules diffusers put an adapter on.
        max_rewriting_error: Greatest difference between the adapter as trained and as written, where a frozen start or
            different alphas had to be written as other numbers, or numbers were rounded; 0 elsewhere.
        rank_mask_difference: How far answers without the timestep rank's mask are from those with it, as a share of
            what the adapter changes (root mean squares); None if there is no timestep rank.
    """

    max_error: float
    max_effect: float
    num_modules: int
    max_rewriting_error: float
    rank_mask_difference: float | None


@torch.no_grad()
def verify_lora(
    path: Path,
    state: LoraState,
    pipeline: DiffusionPipeline,
    timestep_rank: TimestepRank | None = None,
    dtype: torch.dtype = torch.float32,
) -> Verification:
    """Load a file through diffusers and compare it with the weights it was written from.

    Args:
        path: The LoRA file.
        state: The trained weights, by module path.
        pipeline: A freshly loaded base in float32; its networks are used up (they keep diffusers' adapter).
        timestep_rank: The ranks used at each noise level in training; what they change is measured.
        dtype: What the file stores; rounding to it counts as rewriting.

    Returns:
        The figures; `max_error` is 0.

    Raises:
        ExportError: diffusers cannot load the file, puts adapters on other modules, or any answer differs.
    """
    plain = _answers(pipeline)
    trained = _answers_with(pipeline, state)
    written = _answers_with(pipeline, rounded(file_form(state), dtype))
    masked = None if timestep_rank is None else _answers_with(pipeline, state, timestep_rank)
    try:
        with _quiet():
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ExportError(f"diffusers cannot load {path}: {error}") from error
    _align(pipeline)
    loaded = _answers(pipeline)
    found = _adapted(pipeline)
    if found != set(state):
        missing = sorted(set(state) ^ found)
        raise ExportError(f"{path}: diffusers loaded other modules than were trained, among them {missing[0]}.")
    proof = Verification(
        max_error=_distance(written, loaded),
        max_effect=_distance(trained, plain),
        num_modules=len(found),
        max_rewriting_error=_distance(trained, written),
        rank_mask_difference=None if masked is None else _share(trained[0], masked[0], plain[0]),
    )
    if proof.max_error != 0.0:
        raise ExportError(f"{path} does not reproduce the trained model: it differs by up to {proof.max_error:g}.")
    return proof


def _answers(pipeline: DiffusionPipeline) -> list[Tensor]:
    """Answers to fixed inputs: the UNet's at three noise levels, (3, C, h, w), then each text encoder's, (2, L, D)."""
    unet = pipeline.unet
    size = min(VERIFY_LATENT_EDGE, unet.config.sample_size)
    batch = len(VERIFY_TIMESTEPS)
    latents = seeds.normal((batch, unet.config.in_channels, size, size), 0, "proof latents")
    text = seeds.normal((batch, 77, unet.config.cross_attention_dim), 0, "proof text")
    more = _added_conditions(unet, batch)
    answers: list[Tensor] = [unet(latents, torch.tensor(VERIFY_TIMESTEPS), text, return_dict=False, **more)[0]]
    for encoder in _text_encoders(pipeline):
        length = encoder.config.max_position_embeddings
        tokens = torch.arange(2 * length).reshape(2, length) % encoder.config.vocab_size
        answers.append(encoder(tokens).last_hidden_state)
    return answers


def _added_conditions(unet: UNet2DConditionModel, batch: int) -> dict[str, Any]:
    """What Stable Diffusion XL's UNet takes as well: a pooled text (B, P) and sizes (B, 6)."""
    if unet.config.addition_embed_type != "text_time":
        return {}
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    pooled = seeds.normal((batch, width), 0, "proof pooled text")
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def _text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    encoders = [getattr(pipeline, name, None) for name in NETWORKS[1:]]
    return [encoder for encoder in encoders if encoder is not None]


def _answers_with(
    pipeline: DiffusionPipeline, state: LoraState, timestep_rank: TimestepRank | None = None
) -> list[Tensor]:
    text_encoders = _text_encoders(pipeline)
    adapter = inject_state(pipeline.unet, state, text_encoders=text_encoders, timestep_rank=timestep_rank)
    answers = _answers(pipeline)
    adapter.remove()
    return answers


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The greatest difference between answers; infinite where any is not finite, so that it cannot pass for none."""
    found = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    return found if found == found else float("inf")


def _share(unmasked: Tensor, masked: Tensor, plain: Tensor) -> float:
    changed = float((masked - plain).square().mean().sqrt())
    return float((unmasked - masked).square().mean().sqrt()) / changed if changed > 0 else 0.0


def _adapted(pipeline: DiffusionPipeline) -> set[str]:
    """The paths of the modules that diffusers put an adapter on."""
    return {
        prefix + name.removesuffix(".lora_A")
        for prefix, network in by_prefix(pipeline.unet, _text_encoders(pipeline)).items()
        for name, _ in network.named_modules()
        if name.endswith(".lora_A")
    }


def _align(pipeline: DiffusionPipeline) -> None:
    """Move the loaded weights out of the file's memory map.

    There they stand at any address, and products with unaligned numbers are summed in another order: the same
    weights would give answers that differ in the last bit.
    """
    for network in (pipeline.unet, *_text_encoders(pipeline)):
        for name, parameter in network.named_parameters():
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
