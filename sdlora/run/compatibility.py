"""What programs other than diffusers make of a LoRA file, said at the end of a run.

Used by the run, after the file was verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdlora.config.schema import RunConfig
from sdlora.lora_files.verify import VERIFY_TIMESTEPS


def limits_elsewhere(config: RunConfig, proof: Mapping[str, Any]) -> list[str]:
    """What other programs do differently with a file of this kind, a sentence each.

    Args:
        config: `lora`, `file` and `loss` are read.
        proof: The figures of `sdlora.lora_files.verify.Verification`, by name.
    """
    lora, sentences = config.lora, []
    if lora.timestep_rank_min is not None:
        timesteps = ", ".join(map(str, VERIFY_TIMESTEPS))
        sentences.append(
            "Programs that ignore the timestep rank use all ranks: their predictions differ by "
            f"{proof['rank_mask_difference']:.0%} of what the LoRA changes (root mean square at timesteps {timesteps})."
            " In diffusers, sdlora.apply_timestep_rank sets the right ranks."
        )
    if lora.dora or config.file.format == "peft":
        what = "DoRA" if lora.dora else "file"
        sentences.append(
            f"This {what} has PEFT's names, which diffusers and PEFT read; ComfyUI, A1111 and Forge do not."
        )
    if config.file.precision != "fp32":
        sentences.append(
            f"Rounding the file to {config.file.precision} changes predictions by up to "
            f"{proof['max_rewriting_error']:.2g}, where the LoRA changes them by up to {proof['max_effect']:.2g}."
        )
    if config.loss.zero_terminal_snr:
        sentences.append(
            "This LoRA was trained on a noise schedule that ends in pure noise. Sample with one that does, too: in "
            "diffusers a scheduler with rescale_betas_zero_snr=True and timestep_spacing='trailing'."
        )
    return sentences
