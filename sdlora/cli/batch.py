"""The command `sdlora batch`: many runs from one file.

Exit code 8 says that not every job is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sdlora.common.quiet import quiet_libraries
from sdlora.common.signals import exit_code_of, stop_signals

EXIT_NOT_ALL_DONE = 8

batch_app = typer.Typer()


@batch_app.command()
def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="The file of jobs; see docs/scaling.md.")],
    output: Annotated[
        str | None, typer.Option(help="The batch's folder or URL; runs/NAME of the file by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try one step of every job and tell what the batch would take.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try jobs again that failed before.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Who carries the jobs out: this machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster; one is started on this machine if left out.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="Each job's share of a GPU on Ray; 1 where the cluster has any.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")] = False,
) -> None:
    """Train many LoRAs; the same command again goes on with what is not done."""
    from sdlora.batch.jobs import read_jobs

    planned = read_jobs(jobs)
    from sdlora.batch.batch import run_batch
    from sdlora.batch.engine import Engine, LocalEngine, environments
    from sdlora.batch.location import Location
    from sdlora.batch.table import BatchTable
    from sdlora.cli.progress import JsonLines

    location = Location(output or str(Path("runs") / jobs.stem))
    console = Console(stderr=True, highlight=False)
    if dry_run:
        quiet_libraries()
        from sdlora.batch.dry_run import tell_forecast

        tell_forecast(planned, location.folder, json_=json_)
        return
    view = JsonLines(sys.stdout) if json_ else BatchTable(console)
    carrier: Engine
    if engine == "ray":
        from sdlora.batch.ray_engine import RayEngine

        carrier = RayEngine(location, address, gpus)
    else:
        carrier = LocalEngine(location.folder / "workers", environments())
    standing: dict[str, Any] = {}
    with stop_signals(lambda text: _say(console, text)) as stop_signal, view:
        messages = run_batch(planned, location, carrier, retry=retry, should_stop=lambda: stop_signal() is not None)
        for message in messages:
            view.show(message)
            standing = message
    _tell(console, standing)
    if stop_signal() is not None and standing["open"]:
        _say(console, "The same command goes on where this one stopped.")
        raise typer.Exit(exit_code_of(stop_signal()))
    if standing["failed"] or standing["open"]:
        raise typer.Exit(EXIT_NOT_ALL_DONE)


def _tell(console: Console, standing: dict[str, Any]) -> None:
    total = sum(len(standing[key]) for key in ("done", "failed", "open"))
    _say(console, f"{len(standing['done'])} of {total} jobs are done.")
    for key, what in (("failed", "failed"), ("open", "left")):
        if standing[key]:
            _say(console, f"{len(standing[key])} {what}: {', '.join(standing[key])}.")
    _say(console, f"What came of them: {standing['folder']}/report.html")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
