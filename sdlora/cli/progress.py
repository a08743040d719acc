"""Views of a run's events: a progress bar for people, JSON lines for programs.

Commands pass every event to one of the two; the wording is in `describe`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from sdlora import events
from sdlora.cli.describe import describe_check, describe_losses, describe_plan
from sdlora.common.metrics import LossSmoother
from sdlora.common.text import format_seconds
from sdlora.events import Event
from sdlora.run.eta import Timer


class JsonLines:
    """Prints every event, or every message of a batch, as a line of JSON."""

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
    """Shows phase, step, loss, images per second and the time left, with a line for every event that matters."""

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
        """Show an event."""
        self._timer.see(event)
        if isinstance(event, events.PlanMade):
            self._plan = event
            self._print(describe_plan(event))
        elif isinstance(event, events.Notice):
            self._print(event.message)
        elif isinstance(event, events.Progress):
            self._update(event.phase, event.done, event.total, self._eta())
        elif isinstance(event, events.StepDone):
            loss = self._smoother.add(event.loss)
            rate = len(event.examples) / event.seconds if event.seconds else 0.0
            detail = f"epoch {event.epoch} step {event.step} loss {loss:.4f} {rate:.1f} images/s {self._eta()}"
            self._update("training", event.step, self._plan.steps if self._plan else event.step, detail)
        elif isinstance(event, events.EpochDone):
            if (losses := describe_losses(event)) is not None:
                self._print(losses)
        elif isinstance(event, events.CopyChecked):
            self._print(describe_check(event))
        elif isinstance(event, events.Exported):
            self._print(f"Loaded back through diffusers: {event.num_modules} modules, max error {event.max_error:g}.")
        elif isinstance(event, events.RunDone):
            self._print(f"Done in {format_seconds(event.seconds)}: {event.file}")
            self._print(f"Report: {event.folder}/report.html, previews: {event.folder}/previews.png")

    def _eta(self) -> str:
        left = self._timer.eta_seconds
        return "" if left is None else f"{format_seconds(left)} left"

    def _update(self, phase: str, done: int, total: int, detail: str) -> None:
        self._bar.update(self._task, description=phase, completed=done, total=total, detail=detail)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
