"""What to change when a run fails: the setting, its value, and the next lower one.

Used by `run`.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from sdlora.config.schema import RunConfig
from sdlora.run.folder import RunFolder

_GO_ON = "The run can be gone on with:"


def out_of_memory(config: RunConfig, phase: str, resolution_px: int | None = None) -> str:
    """What to say when the device's memory is full.

    Args:
        config: The run's.
        phase: "load", "cache", "train" or "preview".
        resolution_px: The training size, where the base is known.
    """
    told = {
        "load": "The base does not fit into the device's memory.",
        "cache": "The device ran out of memory while images were encoded.",
        "train": "The device ran out of memory in a training step.",
        "preview": "The device ran out of memory while previews were drawn.",
    }[phase]
    return f"{told} {_lower(config, phase, resolution_px or config.data.resolution_px or 512)}"


def _lower(config: RunConfig, phase: str, resolution_px: int) -> str:
    train = config.train
    if phase == "load":
        if train.precision == "fp32":
            return "Set train.precision to 'bf16' (now 'fp32'), which halves the UNet, or close other programs."
        if config.base.quantization != "nf4":
            fewer = "int8" if config.base.quantization == "none" else "nf4"
            return (
                f"Set base.quantization to {fewer!r} (now {config.base.quantization!r}), which keeps most of a large "
                "UNet in half the memory, or close other programs."
            )
        return f"Close other programs that use it, or set train.device to 'cpu' (now {train.device!r})."
    if phase == "preview":
        return (
            f"{_GO_ON} --resume --set preview.enabled=false (now true) goes on without images. For another run, set "
            f"preview.guidance to 1 (now {config.preview.guidance:g}), which draws with half as much."
        )
    if phase == "train" and train.batch_size > 1 and not train.auto_batch:
        half = train.batch_size // 2
        return (
            f"{_GO_ON} --resume --set train.auto_batch=true computes smaller parts of every batch, to the same result. "
            f"For another run, set train.batch_size to {half} (now {train.batch_size}) and "
            f"train.gradient_accumulation_steps to {train.gradient_accumulation_steps * train.batch_size // half} "
            f"(now {train.gradient_accumulation_steps})."
        )
    if phase == "train" and not train.gradient_checkpointing:
        return (
            f"{_GO_ON} --resume --set train.gradient_checkpointing=true (now false) needs far less memory for the same "
            "training, and takes about a third longer."
        )
    step_px = config.data.bucket_step_px
    lower = max(step_px, (resolution_px - 1) // step_px * step_px)
    if lower < resolution_px:
        return f"Start anew with data.resolution_px = {lower} (now {resolution_px})."
    rank = max(config.lora.ranks())
    return f"Start anew with lora.rank = {max(1, rank // 2)} (now {rank}), or another train.device."


def phase_of(error: BaseException) -> str:
    """What a run was doing when an error was raised: "preview", "train" or "cache"."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    places = {file.parts[-3:] for file in files}
    if any(place[:2] == ("sdlora", "previews") for place in places):
        return "preview"
    in_training = {("sdlora", "training", name) for name in ("trainer.py", "validation.py")}
    return "train" if places & in_training else "cache"


def diverged(message: str, folder: RunFolder) -> str:
    """What to say when numbers are no longer finite: what is wrong, and which epoch is still good."""
    whole = [number for number in range(1, 6) if folder.epoch_lora(number).exists()]
    if not whole:
        return f"{message} No epoch was finished before."
    return f"{message} The last good epoch is kept: {folder.epoch_lora(whole[-1])}."
