"""Events for people (a progress bar) and for programs (JSON lines).

Reads events, knows nothing of how they came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from sdlora import events
from sdlora.common.metrics import LossSmoother
from sdlora.common.text import format_bytes, format_seconds
from sdlora.copycheck.verdict import EpochCheck
from sdlora.events import Event
from sdlora.run.eta import Timer


class JsonLines:
    """Prints every event, or every message of a batch, as one line of JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def show(self, event: Event | Mapping[str, Any]) -> None:
        """Print an event."""
        line = event if isinstance(event, Mapping) else event.to_json()
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)


class ProgressBar:
    """A bar with phase, step, loss, images per second and the time left, previews included."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:<15}"), BarColumn(), TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"), console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("loading", total=None, detail="")
        self._plan: events.PlanMade | None = None
        self._smoother = LossSmoother()
        self._timer = Timer()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Draw an event."""
        self._timer.see(event)
        if isinstance(event, events.PlanMade):
            self._plan = event
            self._line(describe_plan(event))
        elif isinstance(event, events.Notice):
            self._line(event.message)
        elif isinstance(event, events.Progress):
            self._update(event.phase, event.done, event.total, self._eta())
        elif isinstance(event, events.StepDone):
            loss = self._smoother.add(event.loss)
            rate = len(event.examples) / event.seconds if event.seconds else 0.0
            detail = f"epoch {event.epoch} step {event.step} loss {loss:.4f} {rate:.1f} images/s {self._eta()}"
            self._update("training", event.step, self._plan.steps if self._plan else event.step, detail)
        elif isinstance(event, events.EpochDone):
            name = f"epoch {event.epoch}" if event.epoch else "the base"
            losses = [("training loss", event.train_loss), ("validation loss", event.validation_loss)]
            told = [f"{label} {value:.5f}" for label, value in losses if value is not None]
            if told:
                self._line(f"{name}: {', '.join(told)}")
        elif isinstance(event, events.CopyChecked):
            self._line(describe_check(event))
        elif isinstance(event, events.Exported):
            self._line(f"Loaded back through diffusers: {event.num_modules} modules, max error {event.max_error:g}.")
        elif isinstance(event, events.RunDone):
            self._line(f"Done in {format_seconds(event.seconds)}: {event.file}")
            self._line(f"Previews of every epoch: {event.folder}/previews.png, and a page: {event.folder}/report.html")

    def _eta(self) -> str:
        left = self._timer.eta_seconds
        return "" if left is None else f"{format_seconds(left)} left"

    def _update(self, phase: str, done: int, total: int, detail: str) -> None:
        self._bar.update(self._task, description=phase, completed=done, total=total, detail=detail)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_plan(plan: events.PlanMade) -> str:
    """The plan in one paragraph that an artist understands."""
    share = plan.trained_parameters / plan.base_parameters
    kept_out = ""
    if plan.split_off:
        kept_out = (
            f"{len(plan.split_off)} more images ({', '.join(plan.split_off)}) are not trained on: the validation loss "
            "is measured on them. Set data.validation_split = false to train on them, too.\n"
        )
    elif plan.validation_images:
        kept_out = f"The validation loss is measured on {plan.validation_images} images of data.validation_folder.\n"
    seen = "".join(
        f"{one.name}: {one.images} images x {one.repeats} repeats x {plan.epochs} epochs: every image is seen "
        f"{one.exposures_per_image} times.\n"
        for one in plan.sets
    ) or (
        f"{plan.images} images x {plan.repeats} repeats x {plan.epochs} epochs: every image is seen "
        f"{plan.exposures_per_image} times, "
    )
    prior = ""
    if plan.prior_images:
        prior = (
            f"Beside them {plan.prior_images} images of data.preservation_folder are trained, as many in each "
            "step, so that the base keeps what they show.\n"
        )
    return (
        f"{seen}{plan.steps} steps of "
        f"{plan.batch_size * plan.gradient_accumulation_steps} images on {plan.device} ({plan.precision}).\n"
        f"{prior}{kept_out}Training {plan.trained_parameters:,} parameters in "
        f"{', '.join(plan.targets)}, {share:.2%} of the base's {plan.base_parameters:,}; the base itself "
        f"stays as it is.{_memory(plan)}"
    )


def _memory(plan: events.PlanMade) -> str:
    if plan.peak_bytes is None or plan.memory_bytes is None:
        return ""
    need = f"\nPeak memory: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.memory_bytes)} free"
    if plan.peak_bytes <= plan.memory_bytes:
        return f"{need}."
    return f"{need}, so it will probably run out. `sdlora plan` says what to change first."


def describe_check(event: events.CopyChecked) -> str:
    """A copy check in one line."""
    name = f"epoch {event.epoch}" if event.epoch else "the base"
    training, preview = event.most_similar
    return (
        f"{name}: {event.verdict}, {event.share:.0%} of previews match (at least {event.share_lower_bound:.0%}). "
        f"Most alike: {preview} and {training}, {event.similarity:.2f}. {event.reason}"
    )


_VERDICT_STYLES = {"clean": "green", "watch": "yellow", "copying": "bold red"}


def copy_table(checks: Mapping[int, EpochCheck]) -> Table:
    """Copy checks for the command line, an epoch in each row."""
    table = Table("epoch", "verdict", "previews that match", "most alike", "why", box=None, pad_edge=False)
    for epoch, check in sorted(checks.items()):
        best, total = check.most_similar(), len(check.previews)
        found = sum(match.significant for match in check.previews)
        table.add_row(
            str(epoch) if epoch else "base",
            Text(check.verdict, style=_VERDICT_STYLES[check.verdict]),
            f"{found} of {total}, at least {check.share_lower_bound:.0%}",
            # File names may hold brackets, which would be read as styles.
            Text(f"{best.file.rpartition('/')[2]} is {best.similarity:.2f} like {best.nearest}"),
            Text("" if check.verdict == "clean" else check.reason),
        )
    return table
