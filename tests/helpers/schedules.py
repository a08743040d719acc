"""Images without files, and the settings of an exposure schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdlora.data.dataset import Dataset, Example
from sdlora.diffusion.timesteps import Density
from sdlora.training.schedule import ScheduleSettings


def dataset(repeats: list[int], name: str = "p") -> Dataset:
    """Images in two sizes by turns."""
    return Dataset(
        Path("set"),
        tuple(
            Example(f"{name}{index}", Path("x"), "x", (32, 32) if index % 2 else (40, 24), (64, 64), repeats=times)
            for index, times in enumerate(repeats)
        ),
        (),
    )


def schedule_settings(**changes: Any) -> ScheduleSettings:
    """Three epochs in batches of two."""
    settings = {
        "epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 1, "density": Density("uniform"),
        "coverage": "image", "seed": 0,
    }  # fmt: skip
    return ScheduleSettings(**{**settings, **changes})
