"""Verification of a written LoRA file: diffusers loads it, and its predictions must equal the trained adapter's.

Run after every epoch's export. Shapes: B batch, C latent channels, h/w latents, L tokens, D text width, P pooled width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sdlora.errors import DivergedError, ExportError
from sdlora.lora.inject import NETWORKS, LoraState, by_prefix, inject_state
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.names import as_written, rounded
from sdlora.models.families import class_of, network_of


@dataclass(frozen=True)
class Verification:
    """Largest differences between the predictions of a base, a trained adapter and its file.

    As written, weights have no initial factors, one alpha per network, and the dtype of the file.
    """

    max_error: float  # between the weights as written and the loaded file
    max_effect: float  # between the base and the trained adapter
    num_modules: int  # that diffusers put an adapter on
    max_rewriting_error: float  # between the weights as trained and as written
    # Without and with the timestep rank's mask, as a share of the adapter's effect (root mean squares).
    rank_mask_difference: float | None


@torch.no_grad()
def verify_lora(
    path: Path,
    state: LoraState,
    pipeline: DiffusionPipeline,
    timestep_rank: TimestepRank | None = None,
    dtype: torch.dtype = torch.float32,
) -> Verification:
    """Load a file through diffusers and compare its predictions with those of the weights it was written from.

    Args:
        state: The trained weights, by module path.
        pipeline: A freshly loaded base in float32; its networks keep diffusers' adapter.
        timestep_rank: Ranks by timestep in training; their effect is measured.
        dtype: Dtype that the file stores; rounding to it counts as rewriting.

    Returns:
        The measured differences; `max_error` is 0.

    Raises:
        DivergedError: The trained weights' predictions are not finite.
        ExportError: diffusers cannot load the file, puts adapters on other modules, or any prediction differs.
    """
    plain = _predictions(pipeline)
    trained = _predictions_with(pipeline, state)
    if not all(bool(prediction.isfinite().all()) for prediction in trained):
        raise DivergedError(
            f"The trained LoRA's predictions are NaN or infinite ({path}): the model has diverged. Start a new run "
            "with a lower train.learning_rate."
        )
    names = class_of(pipeline).names
    written = _predictions_with(pipeline, rounded(as_written(state, names), dtype))
    masked = None if timestep_rank is None else _predictions_with(pipeline, state, timestep_rank)
    try:
        with _errors_alone():
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ExportError(f"diffusers cannot load {path}: {error}") from error
    # Out of the file's memory map, where weights may be unaligned: products of unaligned tensors are summed in another
    # order, so that the same weights would give predictions that differ in the last bit.
    networks, found = by_prefix(network_of(pipeline), _text_encoders(pipeline)), set()
    for prefix, network in networks.items():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.clone()
        adapted = [name for name, _ in network.named_modules() if name.endswith(".lora_A")]
        found |= {prefix + name.removesuffix(".lora_A") for name in adapted}
    loaded = _predictions(pipeline)
    if different := sorted(set(state) ^ found):
        raise ExportError(f"{path}: diffusers loaded other modules than were trained, the first is {different[0]!r}.")
    verification = Verification(
        max_error=_distance(written, loaded),
        max_effect=_distance(trained, plain),
        num_modules=len(found),
        max_rewriting_error=_distance(trained, written),
        rank_mask_difference=None if masked is None else _share(trained[0], masked[0], plain[0]),
    )
    if verification.max_error != 0.0:
        raise ExportError(
            f"{path} does not reproduce the trained model: predictions differ by up to {verification.max_error:g}."
        )
    return verification


def _predictions(pipeline: DiffusionPipeline) -> list[Tensor]:
    """Outputs for fixed inputs: the network's at three timesteps, (3, C, h, w), then each text encoder's, (2, L, D)."""
    predictions = class_of(pipeline).probe(network_of(pipeline))
    for encoder in _text_encoders(pipeline):
        length = encoder.config.max_position_embeddings
        tokens = torch.arange(2 * length).reshape(2, length) % encoder.config.vocab_size
        predictions.append(encoder(tokens).last_hidden_state)
    return predictions


def _text_encoders(pipeline: DiffusionPipeline) -> list[Any]:
    if not class_of(pipeline).trains_text:
        return []
    encoders = [getattr(pipeline, name, None) for name in NETWORKS[1:]]
    return [encoder for encoder in encoders if encoder is not None]


def _predictions_with(
    pipeline: DiffusionPipeline, state: LoraState, timestep_rank: TimestepRank | None = None
) -> list[Tensor]:
    texts = _text_encoders(pipeline)
    adapter = inject_state(network_of(pipeline), state, text_encoders=texts, timestep_rank=timestep_rank)
    predictions = _predictions(pipeline)
    adapter.remove()
    return predictions


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference between predictions; infinite if any is NaN, so that it cannot pass for 0."""
    largest = [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]
    return math.inf if any(map(math.isnan, largest)) else max(largest)


def _share(unmasked: Tensor, masked: Tensor, plain: Tensor) -> float:
    changed = float((masked - plain).square().mean().sqrt())
    return float((unmasked - masked).square().mean().sqrt()) / changed if changed > 0 else 0.0


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Silence diffusers' warning that a LoRA of the UNet alone has nothing for the text encoder."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
