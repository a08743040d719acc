"""Images without files, and the settings of an exposure schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlora.config.schema import RunConfig
from sdlora.data.dataset import Dataset, Example
from sdlora.diffusion.timesteps import Density
from sdlora.run.arguments import training_settings
from sdlora.training.settings import TrainingSettings


def dataset(repeats: list[int], name: str = "p") -> Dataset:
    """Images in two sizes by turns."""
    return Dataset(
        tuple(
            Example(f"{name}{index}", Path("x"), "x", (32, 32) if index % 2 else (40, 24), (64, 64), repeats=times)
            for index, times in enumerate(repeats)
        ),
        (),
    )


def schedule_settings(**changes: Any) -> TrainingSettings:
    """Three epochs in batches of two."""
    settings = {"epochs": 3, "batch_size": 2, "density": Density("uniform"), "coverage": "image", "seed": 0}
    return replace(training_settings(RunConfig()), **settings | changes)
