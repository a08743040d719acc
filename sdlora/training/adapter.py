"""From a configuration to the adapter that it asks for, and what other programs make of its file.

Layers take plain arguments; this is where the settings become those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.lora.inject import Adapter, AdapterSpec, inject
from sdlora.lora.targets import TEXT_ENCODER
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.verify import VERIFY_TIMESTEPS
from sdlora.models.base import BaseModel


def make_adapter(config: RunConfig, base: BaseModel, paths: Sequence[str]) -> Adapter:
    """Put a fresh adapter of the configured kind on a base.

    Args:
        config: `lora` and `seed` are read.
        base: Its UNet, and its text encoders where they are a target, are changed in place.
        paths: Module paths, as `find_targets` gives them.

    Raises:
        ConfigError: The start needs more singular values than a layer has.
    """
    lora = config.lora
    text_is_trained = any(path.startswith(TEXT_ENCODER) for path in paths)
    texts = base.bring_text_encoders() if text_is_trained else base.text_encoders
    return inject(base.unet, paths, lora.rank, lora.alpha, config.seed, spec=adapter_spec(lora), text_encoders=texts)


def adapter_spec(lora: LoraConfig) -> AdapterSpec:
    """What kind of adapter is configured."""
    return AdapterSpec(
        target_ranks={str(target): rank for target, rank in lora.target_ranks.items()},
        target_alphas={str(target): alpha for target, alpha in lora.target_alphas.items()},
        rslora=lora.rslora,
        dora=lora.dora,
        dropout=lora.dropout,
        init=lora.init,
        timestep_rank=timestep_rank(lora),
    )


def timestep_rank(lora: LoraConfig) -> TimestepRank | None:
    """The ranks to use at each noise level, or None for all of them everywhere."""
    if lora.timestep_rank_min is None:
        return None
    return TimestepRank(lora.timestep_rank_min, lora.timestep_rank_alpha)


def limits_elsewhere(config: RunConfig, proof: Mapping[str, Any]) -> list[str]:
    """What programs other than diffusers do with a file of this kind, a sentence each.

    Args:
        config: `lora`, `file` and `loss` are read.
        proof: The figures of `sdlora.lora_files.verify.Verification`, by name.
    """
    lora, sentences = config.lora, []
    if lora.timestep_rank_min is not None:
        levels = ", ".join(map(str, VERIFY_TIMESTEPS))
        sentences.append(
            "Programs that ignore the timestep rank draw with all ranks: their answers differ by "
            f"{proof['rank_mask_difference']:.0%} of what the LoRA changes (root mean square at noise {levels}). "
            "In diffusers, sdlora.apply_timestep_rank uses the right ranks."
        )
    if lora.dora or config.file.format == "peft":
        what = "DoRA" if lora.dora else "file"
        sentences.append(
            f"This {what} has PEFT's names, which diffusers and PEFT read; ComfyUI, A1111 and Forge find nothing in it."
        )
    if config.file.precision != "fp32":
        sentences.append(
            f"Rounding the file to {config.file.precision} changes answers by up to {proof['max_rewriting_error']:.2g}"
            f", where the LoRA changes them by up to {proof['max_effect']:.2g}."
        )
    if config.loss.zero_terminal_snr:
        sentences.append(
            "This LoRA was trained on a schedule that ends in pure noise. Draw with one that does, too: in diffusers a "
            "scheduler with rescale_betas_zero_snr=True and timestep_spacing='trailing'."
        )
    return sentences
