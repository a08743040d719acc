"""What a batch takes, from a training step and a few denoising steps of every job, computed here.

Behind `sdlora batch --dry-run`; writes nothing but what the cache keeps of the images that are tried.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdlora.batch.engine import Message
from sdlora.batch.jobs import Job
from sdlora.batch.task import PeakMemory
from sdlora.common.text import format_bytes, format_seconds
from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError
from sdlora.estimate.costs import step_seconds
from sdlora.previews.sampler import draw
from sdlora.run.folder import RunFolder
from sdlora.run.preview_requests import drawing_share, rounds_within_epochs
from sdlora.run.setup import BasePool, RunContext, forget_accelerator, prepare


def print_estimates(jobs: Sequence[Job], folder: Path, *, json_: bool) -> None:
    """Print what a batch takes: a table on stdout, or JSON lines; the batch's folder is not touched."""
    bases = BasePool()
    found = [_estimate(job, folder / job.name, bases) for job in jobs]
    if json_:
        for one in found:
            print(json.dumps(one), file=sys.stdout)
        return
    table = Table("job", "images", "each seen", "steps", "training", "previews", "memory", "", box=None, pad_edge=False)
    for one in found:
        peak = one["peak_memory_bytes"]
        known = [] if one["fault"] else [
            *(str(one[key]) for key in ("pictures", "exposures", "steps")), format_seconds(one["training_seconds"]),
            format_seconds(one["preview_seconds"]), "" if peak is None else format_bytes(peak),
        ]  # fmt: skip
        table.add_row(Text(one["job"]), *(known or [""] * 6), Text(one["fault"] or ""))
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(table)
    total = sum(one["training_seconds"] + one["preview_seconds"] for one in found)
    faults = sum(one["fault"] is not None for one in found)
    console.print(
        f"{len(found)} jobs, {faults} of them with faults: about {format_seconds(total)} of training and previews on "
        "one device, without loading, caching, validation and the copy check."
    )


def _estimate(job: Job, folder: Path, bases: BasePool) -> Message:
    """What a job takes on this machine, as busy as it is now; with a fault nothing else is known."""
    found: Message = {
        "event": "forecast", "job": job.name, "fault": job.fault, "pictures": 0, "exposures": 0, "steps": 0,
        "training_seconds": 0.0, "preview_seconds": 0.0, "peak_memory_bytes": None,
    }  # fmt: skip
    if job.config is None:
        return found
    try:
        return found | _try(job.name, job.config, folder, bases)
    except SdloraError as error:
        return found | {"fault": str(error)}
    except torch.OutOfMemoryError as error:
        return found | {"fault": f"It does not fit into memory: {error}"}


def _try(name: str, config: RunConfig, folder: Path, bases: BasePool) -> Message:
    forget_accelerator()
    peak = PeakMemory()
    context = prepare(config, RunFolder(folder, name), bases)
    try:
        steps = context.trainer.total_steps
        return {
            "pictures": len(context.data.dataset.examples),
            "exposures": config.data.repeats_range[1] * config.train.epochs,  # the highest of several sets
            "steps": steps,
            # Each as long as one with the largest images.
            "training_seconds": steps * step_seconds(context.trainer, config.data.background),
            "preview_seconds": _rounds(context) * _preview_seconds(context),
            "peak_memory_bytes": peak.num_bytes(),
        }
    finally:
        context.adapter.remove()


def _rounds(context: RunContext) -> float:
    """How often the checked previews are drawn, the others counted by their arithmetic."""
    epochs, trainer = context.config.train.epochs, context.trainer
    within = rounds_within_epochs(trainer.settings.preview_every_steps, trainer.total_steps, epochs)
    return (epochs + 1 + within) * drawing_share(context.drawn)


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
