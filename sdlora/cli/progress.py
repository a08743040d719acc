"""A run's events for a person at a terminal, as a progress bar with words, and for programs, as JSON lines.

Commands pass every event to one of the two views.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdlora.cli.options import print_message
from sdlora.common.run_files import LossSmoother
from sdlora.common.text import format_bytes, format_seconds
from sdlora.copycheck.verdict import EpochCheck
from sdlora.events import (
    CopyChecked,
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PlannedSet,
    Progress,
    RunDone,
    StepDone,
)
from sdlora.run.folder import Timer

_VERDICT_STYLES = {"clean": "green", "watch": "yellow", "copying": "bold red"}


class JsonLines:
    """Prints every event, or every message of a batch, as a line of JSON.

    Where nobody reads them any more, or their disk is full, this is said once, and the run continues.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._is_lost = stream, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._write("")

    def show(self, event: Event | Mapping[str, Any]) -> None:
        """Print an event."""
        line = event if isinstance(event, Mapping) else event.to_json()
        self._write(json.dumps(line) + "\n")

    def _write(self, text: str) -> None:
        if self._is_lost:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            self._is_lost = True
            with suppress(OSError):
                print_message(f"Events are no longer printed ({error.strerror}); the run continues.")
            # What the stream still holds would fail again when Python exits.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class ProgressBar(progress.Progress):
    """Shows phase, step, loss, images per second and the time left, with a line for every event that matters.

    A terminal that is closed meanwhile stops nothing.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            progress.TextColumn("{task.description:<15}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
        )
        super().__init__(*columns, progress.TextColumn("{task.fields[detail]}"), console=console, transient=True)
        self._phase = self.add_task("loading", total=None, detail="")
        self._num_steps: int | None = None
        self._smoother = LossSmoother()
        self._timer = Timer()

    def __exit__(self, *exception: Any) -> None:
        with suppress(OSError):
            super().__exit__(*exception)

    def show(self, event: Event) -> None:
        """Show an event."""
        with suppress(OSError):
            self._show(event)

    def _show(self, event: Event) -> None:
        self._timer.see(event)
        left = self._timer.eta_seconds
        eta = "" if left is None else f"{format_seconds(left)} left"
        match event:
            case PlanMade():
                self._num_steps = event.steps
                self._say(describe_plan(event))
            case Notice():
                self._say(event.message)
            case Progress():
                self._move(event.phase, event.done, event.total, eta)
            case StepDone():
                loss = self._smoother.add(event.loss)
                rate = len(event.examples) / event.seconds if event.seconds else 0.0
                detail = f"epoch {event.epoch} step {event.step} loss {loss:.4f} {rate:.1f} images/s {eta}"
                self._move("training", event.step, self._num_steps or event.step, detail)
            case EpochDone():
                losses = (("training loss", event.train_loss), ("validation loss", event.validation_loss))
                measured = [f"{label} {value:.5f}" for label, value in losses if value is not None]
                if measured:
                    self._say(f"{_epoch_name(event.epoch)}: {', '.join(measured)}")
            case CopyChecked():
                self._say(describe_check(event))
            case Exported():
                modules, error = event.num_modules, event.max_error
                self._say(f"Loaded back through diffusers: {modules} modules, max error {error:g}.")
            case RunDone():
                self._say(f"Done in {format_seconds(event.seconds)}: {event.file}")
                sheet = Path(event.folder) / "previews.png"
                drawn = f", previews: {sheet}" if sheet.is_file() else ""
                self._say(f"Report: {event.folder}/report.html{drawn}")

    def _move(self, phase: str, done: int, total: int, detail: str) -> None:
        self.update(self._phase, description=phase, completed=done, total=total, detail=detail)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def describe_plan(plan: PlanMade) -> str:
    """What a run will train, a line for each fact."""
    parts: list[PlannedSet | PlanMade] = [*plan.sets] or [plan]
    lines = [
        (f"{part.name}: " if isinstance(part, PlannedSet) else "")
        + f"{part.images} images x {part.repeats} repeats x {plan.epochs} epochs: "
        f"each image is seen {part.exposures_per_image} times."
        for part in parts
    ]
    images_per_step = plan.batch_size * plan.gradient_accumulation_steps
    lines.append(f"{plan.steps} steps of {images_per_step} images on {plan.device} ({plan.precision}).")
    if plan.prior_images:
        lines.append(
            f"Each step also trains as many of the {plan.prior_images} images of data.preservation_folder, "
            "which preserves what they show."
        )
    if plan.split_off:
        lines.append(
            f"{len(plan.split_off)} more images ({', '.join(plan.split_off)}) are only used to measure the validation "
            "loss. Set data.validation_split = false to train on them, too."
        )
    elif plan.validation_images:
        lines.append(f"The validation loss is measured on {plan.validation_images} images of data.validation_folder.")
    targets, share = ", ".join(plan.targets), plan.trained_parameters / plan.base_parameters
    lines.append(
        f"Training {plan.trained_parameters:,} parameters in {targets}: {share:.2%} of the base model's "
        f"{plan.base_parameters:,}, which stay frozen."
    )
    if plan.peak_bytes is not None and plan.memory_bytes is not None:
        need = f"Peak memory: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.memory_bytes)} free"
        advice = ", so it will probably run out. `sdlora plan` says what to change first."
        lines.append(need + ("." if plan.peak_bytes <= plan.memory_bytes else advice))
    return "\n".join(lines)


def describe_check(event: CopyChecked) -> str:
    """A copy check in one line."""
    training, preview = event.most_similar
    return (
        f"{_epoch_name(event.epoch)}: {event.verdict}. {event.reason} Most similar: {preview} and {training}, "
        f"{event.similarity:.2f}."
    )


def _epoch_name(epoch: int) -> str:
    return f"epoch {epoch}" if epoch else "base model"


def copy_table(checks: Mapping[int, EpochCheck]) -> Table:
    """The copy checks of a run, a row for each epoch."""
    header = ("epoch", "verdict", "matches", "most similar preview", "nearest image", "reason")
    table = Table(*header, box=None, pad_edge=False)
    for epoch, check in sorted(checks.items()):
        best, total = check.most_similar(), len(check.previews)
        table.add_row(
            str(epoch) if epoch else "base",
            Text(check.verdict, style=_VERDICT_STYLES[check.verdict]),
            # The base model cannot have copied, so there is nothing that its previews leave room for.
            f"{check.num_matches} of {total}" + (f" (room for {check.most_copies:.0%})" if epoch else ""),
            # File names may hold brackets, which would be read as styles.
            Text(f"{best.file.rpartition('/')[2]} ({best.similarity:.2f})"),
            Text(best.nearest),
            Text("" if check.verdict == "clean" else check.reason),
        )
    return table
