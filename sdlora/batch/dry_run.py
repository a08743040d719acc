"""What a batch takes, from a training step and a few denoising steps of every job, computed here.

Behind `sdlora batch --dry-run`; writes nothing but what the cache keeps of the images that are tried.
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
from sdlora.common.text import format_bytes, format_seconds
from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError
from sdlora.estimate.timing import step_seconds
from sdlora.events import saved_as, to_json
from sdlora.previews.sampler import draw
from sdlora.run.folder import RunFolder
from sdlora.run.setup import BasePool, RunContext, forget_accelerator, prepare


@dataclass(frozen=True)
class JobEstimate:
    """What one job takes on this machine, as busy as it is now.

    Attributes:
        fault: What is wrong with it, or None; with a fault nothing else is known.
        exposures: How often each image is seen; the highest of several sets.
        training_seconds: All steps, each as long as one with the largest images.
        preview_seconds: All previews, from the time of a few denoising steps.
        peak_memory_bytes: The peak of memory meanwhile; None where it cannot be measured.
    """

    job: str
    fault: str | None
    images: int = field(default=0, metadata=saved_as("pictures"))
    exposures: int = 0
    steps: int = 0
    training_seconds: float = 0.0
    preview_seconds: float = 0.0
    peak_memory_bytes: int | None = None


def print_estimates(jobs: Sequence[Job], folder: Path, *, json_: bool) -> None:
    """Print what a batch takes: a table on stdout, or JSON lines; the batch's folder is not touched."""
    bases = BasePool()
    found = [_estimate(job, folder / job.name, bases) for job in jobs]
    if json_:
        for one in found:
            print(json.dumps({"event": "forecast", **to_json(one)}, ensure_ascii=False), file=sys.stdout)
        return
    table = Table("job", "images", "each seen", "steps", "training", "previews", "memory", "", box=None, pad_edge=False)
    for one in found:
        known = [] if one.fault else [
            str(one.images), str(one.exposures), str(one.steps), format_seconds(one.training_seconds),
            format_seconds(one.preview_seconds),
            "" if one.peak_memory_bytes is None else format_bytes(one.peak_memory_bytes),
        ]  # fmt: skip
        table.add_row(Text(one.job), *(known or [""] * 6), Text(one.fault or ""))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    total = sum(one.training_seconds + one.preview_seconds for one in found)
    faults = sum(one.fault is not None for one in found)
    console.print(
        f"{len(found)} jobs, {faults} of them with faults: about {format_seconds(total)} of training and previews on "
        "one device, without loading, caching, validation and the copy check."
    )


def _estimate(job: Job, folder: Path, bases: BasePool) -> JobEstimate:
    """Try a step and a preview of a job."""
    if job.config is None:
        return JobEstimate(job.name, job.fault)
    try:
        return _try(job.name, job.config, folder, bases)
    except SdloraError as error:
        return JobEstimate(job.name, str(error))
    except torch.OutOfMemoryError as error:
        return JobEstimate(job.name, f"It does not fit into memory: {error}")


def _try(name: str, config: RunConfig, folder: Path, bases: BasePool) -> JobEstimate:
    forget_accelerator()
    peak = PeakMemory()
    context = prepare(config, RunFolder(folder, name), bases)
    try:
        steps = context.trainer.total_steps
        return JobEstimate(
            job=name,
            fault=None,
            images=len(context.data.dataset.examples),
            exposures=config.data.repeats_range[1] * config.train.epochs,
            steps=steps,
            training_seconds=steps * step_seconds(context.trainer, config.data.background),
            preview_seconds=(config.train.epochs + 1) * _preview_seconds(context),
            peak_memory_bytes=peak.num_bytes(),
        )
    finally:
        context.adapter.remove()


def _preview_seconds(context: RunContext) -> float:
    """All previews of an epoch: what an image costs by itself, and what each denoising step adds."""
    if context.previews is None:
        return 0.0
    wanted, taken, num_drawn = context.previews.wanted(), [], 1
    for num_steps in (1, 1, 3):  # the first one warms up
        start = time.monotonic()
        num_drawn = len(next(draw(context.base, replace(context.previews, num_steps=num_steps), wanted)))
        taken.append(time.monotonic() - start)
    per_step = max(0.0, taken[2] - taken[1]) / 2
    return (taken[1] + per_step * (context.previews.num_steps - 1)) * len(wanted) / num_drawn
