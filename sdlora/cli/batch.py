"""`sdlora batch`: many runs from one jobs file.

Exit code 8 means that not every job is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sdlora.cli.options import JsonEvents, print_message
from sdlora.common.quiet import quiet_libraries
from sdlora.common.signals import exit_code_of, stop_signals

EXIT_NOT_ALL_DONE = 8


def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="Jobs file; see docs/scaling.md.")],
    output: Annotated[
        str | None, typer.Option(help="Folder or URL of the batch; runs/NAME by default, after the file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try one step of every job, and estimate what the batch takes.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed jobs again.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where jobs run: this machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster; by default one is started on this machine.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs per job on Ray; 1 by default if the cluster has any.")
    ] = None,
    json_: JsonEvents = False,
) -> None:
    """Train many LoRAs from a file of jobs.

    The same command continues where it stopped. Exits with code 8 if not every job is done.
    """
    from sdlora.batch.jobs import read_jobs

    planned = read_jobs(jobs)
    from sdlora.batch.batch import run_batch
    from sdlora.batch.engine import Engine, LocalEngine, environments
    from sdlora.batch.location import Location
    from sdlora.batch.table import BatchTable
    from sdlora.cli.progress import JsonLines

    location = Location(output or str(Path("runs") / jobs.stem))
    if dry_run:
        quiet_libraries()
        from sdlora.batch.dry_run import print_estimates

        print_estimates(planned, location.folder, json_=json_)
        return
    console = Console(stderr=True, highlight=False)
    view = JsonLines(sys.stdout) if json_ else BatchTable(console)
    chosen: Engine
    if engine == "ray":
        from sdlora.batch.ray_engine import RayEngine

        chosen = RayEngine(location, address, gpus)
    else:
        chosen = LocalEngine(location.folder / "workers", environments())
    summary: dict[str, Any] = {}
    with stop_signals(lambda text: console.print(text, markup=False, soft_wrap=True)) as stop_signal, view:
        messages = run_batch(planned, location, chosen, retry=retry, should_stop=lambda: stop_signal() is not None)
        for message in messages:
            view.show(message)
            summary = message
    _print_summary(summary)
    if stop_signal() is not None and summary["open"]:
        print_message("Run the same command again to resume.")
        raise typer.Exit(exit_code_of(stop_signal()))
    if summary["failed"] or summary["open"]:
        raise typer.Exit(EXIT_NOT_ALL_DONE)


def _print_summary(summary: dict[str, Any]) -> None:
    total = sum(len(summary[key]) for key in ("done", "failed", "open"))
    print_message(f"{len(summary['done'])} of {total} jobs are done.")
    for key, label in (("failed", "failed"), ("open", "left")):
        if summary[key]:
            print_message(f"{len(summary[key])} {label}: {', '.join(summary[key])}.")
    print_message(f"Results: {summary['folder']}/report.html")
