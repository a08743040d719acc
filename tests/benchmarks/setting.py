"""What the timestep benchmarks share: the recipe, a run that is watched while it trains, images drawn from it.

The run is put together by `sdlora.run.run` and trained by its trainer, so that every option takes effect as it does for
a user; nothing is exported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from variants import Recipe

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.events import CheckpointDue, EpochDone
from sdlora.models.base import BaseModel
from sdlora.run import setup
from sdlora.run.folder import RunFolder
from sdlora.training.validation import image_losses


def recipe(rank: int, repeats: int, epochs: int = 4) -> Recipe:
    """The quickstart's adapter at a constant rate and without preservation, which is not what is compared here."""
    return {
        "data": {"repeats": repeats},
        "lora": {"rank": rank, "alpha": rank, "targets": ["cross_attention", "self_attention", "mlp"]},
        "train": {"batch_size": 4, "learning_rate": 1e-3, "epochs": epochs, "device": "cpu", "precision": "fp32"},
        "preview": {"enabled": False},
    }  # fmt: skip


def make_config(base: str, sets: Path, concept: str, seed: int, *parts: Recipe) -> RunConfig:
    """The configuration of one run; later parts win over earlier ones."""
    document: dict[str, Any] = {
        "seed": seed,
        "base": {"path": base},
        "data": {
            "folder": str(sets / concept),
            "validation_folder": str(sets / concept / "holdout"),
            "trigger": concept,
        },
        "cache": {"dir": str(sets / "cache")},
    }
    for part in parts:
        for section, values in part.items():
            document[section] = {**document.get(section, {}), **values}
    return parse_config(document, name="benchmark")


def prepare(config: RunConfig, folder: Path) -> Any:
    """A run's parts, its cache filled; see `sdlora.run.setup`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = setup.prepare(config, RunFolder(folder, "benchmark"))
    for _ in made.data.fill(config.data.background, made.trainer.schedule.timesteps):
        pass
    for _ in made.validation.data.fill(config.data.background):
        pass
    return made


def validation(made: Any) -> list[float]:
    """The unweighted validation loss in five bands of timesteps, on the same noise whatever the run's seed."""
    data = made.validation.data
    bands: list[float] = image_losses(data, range(len(data.dataset.examples)), 0).mean(dim=(0, 2)).tolist()
    return bands


def watch(
    parts: Any, *, at_point: Callable[[int], None], at_epoch: Callable[[int], None], seconds: list[float] | None = None
) -> None:
    """Train to the end; call `at_point(step)` wherever a checkpoint would be, `at_epoch(epoch)` after every epoch.

    Args:
        parts: From `prepare`; `train.checkpoint_every_steps` says where the points are.
        at_point: Also called with 0, before training.
        at_epoch: The adapter is as it stands after that epoch.
        seconds: Gets the length of every step.
    """
    at_point(0)
    for event in parts.trainer.events():
        if isinstance(event, CheckpointDue):
            at_point(event.step)
        elif isinstance(event, EpochDone):
            at_epoch(event.epoch)
        elif seconds is not None and event.name == "step":
            seconds.append(event.seconds)


def draw_images(base: BaseModel, prompts: Sequence[str], *, guidance: float, steps: int) -> list[Image.Image]:
    """An image per prompt, the adapter as it is, every starting noise another."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 16):
        group = list(prompts[first : first + 16])
        generators = [torch.Generator().manual_seed(1000 + first + i) for i in range(len(group))]
        with torch.no_grad():
            encoded = base.prompt_embeddings(group, [""] * len(group))
            with base.pipeline() as pipeline:
                pipeline.set_progress_bar_config(disable=True)
                made = pipeline(**encoded, num_inference_steps=steps, guidance_scale=guidance, generator=generators)
        images += made.images
    return images


def silence() -> None:
    """No progress bars and no advice from the libraries, so that what is printed is the benchmark's."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
