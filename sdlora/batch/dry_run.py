"""What a batch would take, from one step and a few denoising steps of every job, really computed.

Nothing is written but what the cache keeps of the images that were tried.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdlora.batch.jobs import Job
from sdlora.common.peak_memory import PeakMemory
from sdlora.common.text import format_seconds
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.errors import SdloraError
from sdlora.estimate.memory import preservation_time
from sdlora.events import saved_as, to_json
from sdlora.previews.sampler import draw
from sdlora.run.base_pool import BasePool, forget_accelerator
from sdlora.run.folder import RunFolder
from sdlora.run.setup import Parts, prepare
from sdlora.training.prior_preservation import ClassWords


@dataclass(frozen=True)
class Forecast:
    """What one job would take on this machine, as busy as it is now.

    Attributes:
        job: Its name.
        fault: What is wrong with it, or None; then nothing else is known.
        images: That are trained.
        exposures: How often each is seen.
        steps: Optimizer steps.
        training_seconds: All steps, from the time of one with the largest images.
        preview_seconds: All previews, from the time of a few denoising steps.
        peak_memory_bytes: The most that was held while trying; None where that cannot be told.
    """

    job: str
    fault: str | None
    images: int = field(default=0, metadata=saved_as("pictures"))
    exposures: int = 0
    steps: int = 0
    training_seconds: float = 0.0
    preview_seconds: float = 0.0
    peak_memory_bytes: int | None = None


def forecast(jobs: Sequence[Job], folder: Path) -> list[Forecast]:
    """Try every job for a moment.

    Args:
        jobs: In the order of their turn.
        folder: The batch's, which is not touched.
    """
    bases, found = BasePool(), []
    for job in jobs:
        if job.config is None:
            found.append(Forecast(job.name, job.fault))
            continue
        try:
            found.append(_try(job.name, job.config, folder / job.name, bases))
        except SdloraError as error:
            found.append(Forecast(job.name, str(error)))
        except torch.OutOfMemoryError as error:
            found.append(Forecast(job.name, f"It does not fit into memory: {error}"))
    return found


def _try(name: str, config: RunConfig, folder: Path, bases: BasePool) -> Forecast:
    forget_accelerator()
    peak = PeakMemory()
    parts = prepare(config, RunFolder(folder, name), bases)
    try:
        batches = config.train.epochs * _batches_per_epoch(parts)
        return Forecast(
            job=name,
            fault=None,
            images=len(parts.data.dataset.examples),
            exposures=config.data.repeats_range[1] * config.train.epochs,
            steps=parts.trainer.total_steps,
            training_seconds=batches * _batch_seconds(parts),
            preview_seconds=(config.train.epochs + 1) * _preview_seconds(parts),
            peak_memory_bytes=peak.num_bytes(),
        )
    finally:
        parts.adapter.remove()


def _batches_per_epoch(parts: Parts) -> int:
    config = parts.config
    return parts.trainer.total_steps * config.train.gradient_accumulation_steps // config.train.epochs


def _batch_seconds(parts: Parts) -> float:
    """Forward and backward of a batch of the largest images; the second try counts, since the first one warms up."""
    examples = parts.data.dataset.examples
    largest = max(range(len(examples)), key=lambda index: examples[index].bucket[0] * examples[index].bucket[1])
    for _ in parts.data.cache.fill_moments([examples[largest]], parts.config.data.background):
        pass
    size, every = parts.config.train.batch_size, parts.config.train.preservation_every
    exposures = [Exposure(largest, number) for number in range(1, size + 1)]
    # As many are preserved as ever are in a batch, since memory is measured as well.
    loss = parts.trainer.terms[0].loss
    if isinstance(loss.extra, ClassWords):
        loss.extra.compared = frozenset(exposures[::every])
    for _ in parts.data.cache.fill_text(parts.data.captions(exposures)):
        pass
    seconds = 0.0
    for _ in range(2):
        start = time.monotonic()
        _, objective = loss(exposures, [500] * len(exposures))
        objective.sum().backward()  # type: ignore[no-untyped-call]
        seconds = _elapsed(start)
    parts.trainer.step.optimizer.zero_grad(set_to_none=True)
    if parts.data.prior_caption is not None:
        seconds *= preservation_time(1 / every) / preservation_time(len(exposures[::every]) / size)
    return seconds


def _preview_seconds(parts: Parts) -> float:
    """All previews of an epoch: what an image costs by itself, and what each denoising step adds."""
    if parts.previews is None:
        return 0.0
    wanted = parts.previews.wanted()
    taken = []
    for num_steps in (1, 1, 3):  # the first one warms up
        start = time.monotonic()
        next(draw(parts.base, replace(parts.previews, num_steps=num_steps), wanted))
        taken.append(_elapsed(start))
    drawn = len(next(draw(parts.base, replace(parts.previews, num_steps=1), wanted)))
    per_step = max(0.0, taken[2] - taken[1]) / 2
    return (taken[1] + per_step * (parts.previews.num_steps - 1)) * len(wanted) / drawn


def _elapsed(start: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - start


def tell_forecast(jobs: Sequence[Job], folder: Path, *, json_: bool) -> None:
    """Print what a batch would take: a table on stdout, or JSON lines.

    Args:
        jobs: In the order of their turn.
        folder: The batch's, which is not touched.
        json_: For programs.
    """
    found = forecast(jobs, folder)
    if json_:
        for one in found:
            print(json.dumps({"event": "forecast", **to_json(one)}, ensure_ascii=False), file=sys.stdout)
        return
    table = Table(
        "job", "pictures", "each seen", "steps", "training", "previews", "memory", "", box=None, pad_edge=False
    )
    for one in found:
        known = [] if one.fault else [
            str(one.images), str(one.exposures), str(one.steps), format_seconds(one.training_seconds),
            format_seconds(one.preview_seconds),
            "" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**30:.2f} GiB",
        ]  # fmt: skip
        table.add_row(Text(one.job), *(known or [""] * 6), Text(one.fault or ""))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    total = sum(one.training_seconds + one.preview_seconds for one in found)
    faults = sum(one.fault is not None for one in found)
    console.print(
        f"{len(found)} jobs, {faults} of them with faults: about {format_seconds(total)} of training and previews on "
        "one device. Loading, caches, validation losses and the copy check come on top."
    )
