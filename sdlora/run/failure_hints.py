"""What a run's error message adds: which setting to lower, and which epoch is still good.

Used by `run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdlora.config.schema_training import MAX_EPOCHS
from sdlora.errors import OutOfMemoryError
from sdlora.estimate.hints import Stage, out_of_memory_message
from sdlora.run.folder import RunFolder
from sdlora.run.setup import RunContext


@contextmanager
def hints_in(stage: Stage, context: RunContext) -> Iterator[None]:
    """Say what to set if the device runs out of memory inside the block.

    Args:
        stage: What the block does.
        context: Of the run.

    Raises:
        OutOfMemoryError: The device ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        resolution_px = context.config.data.resolution_px or context.base.resolution_px
        raise OutOfMemoryError(out_of_memory_message(context.config, stage, resolution_px)) from error


def diverged_message(message: str, folder: RunFolder) -> str:
    """What to say when the loss or the adapter is no longer finite: the cause, and the last epoch that is good."""
    whole = [number for number in range(1, MAX_EPOCHS + 1) if folder.epoch_lora(number).exists()]
    if not whole:
        return f"{message} No epoch was finished before."
    return f"{message} The last good epoch is kept: {folder.epoch_lora(whole[-1])}."
