"""Progress of a batch on the terminal: one row per job.

Shows the messages of `run_batch`, as `sdlora.cli.progress` shows the events of a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdlora.batch.engine import Message
from sdlora.common.run_files import LossSmoother
from sdlora.common.text import format_seconds

_STYLES = {"done": "green", "failed": "bold red", "cut": "bold red", "stopped": "yellow", "running": "cyan"}
_ACTIONS = {"skip": "unchanged", "resume": "to resume", "start": "", "fault": "invalid settings"}


@dataclass
class _Row:
    status: str = "waiting"
    progress: str = ""
    loss: float | None = None
    smoother: LossSmoother = field(default_factory=LossSmoother)
    verdict: str = ""
    seconds: float | None = None
    steps: int = 0
    error: str = ""


class BatchTable:
    """Shows messages as a live table; without a terminal, as one line when a job starts and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, message: Message) -> None:
        """Update the table with a message."""
        if message["event"] == "batch":
            return
        row = self._rows.setdefault(message["job"], _Row())
        match message["event"]:
            case "planned":
                row.status, row.error = message["status"], message["error"] or ""
                row.progress = _ACTIONS[message["action"]]
                if "moved" in message:
                    self._print(
                        f"{message['job']}: settings, images or version changed; its old run was moved to "
                        f"{message['moved']}."
                    )
            case "started":
                row.status, row.progress = "running", "loading"
                self._line(f"{message['job']}: started")
            case "plan":
                row.steps = message["steps"]
            case "progress":
                row.progress = f"{message['phase']} {message['done']}/{message['total']}"
            case "step":
                row.loss = row.smoother.add(message["loss"])
                left = format_seconds((row.steps - message["step"]) * message["seconds"])
                row.progress = f"step {message['step']}/{row.steps}, {left} left"
            case "copycheck":
                row.verdict = message["verdict"]
            case "ended":
                row.status, row.seconds, row.progress = message["status"], message["seconds"], ""
                row.error = message["error"] or ""
                self._line(f"{message['job']}: {row.status}{': ' + row.error if row.error else ''}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._print(text)

    def _table(self) -> Table:
        table = Table("job", "status", "progress", "loss", "verdict", "time", "error", box=None, pad_edge=False)
        for name, row in self._rows.items():
            table.add_row(
                Text(name),
                Text(row.status, style=_STYLES.get(row.status, "")),
                Text(row.progress),
                "" if row.loss is None else f"{row.loss:.4f}",
                Text(row.verdict),
                "" if row.seconds is None else format_seconds(row.seconds),
                Text(row.error.splitlines()[0] if row.error else "", overflow="ellipsis", no_wrap=True),
            )
        return table
