"""The command `sdlora cache`: everything a run encodes, encoded before it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import load_config

cache_app = typer.Typer()


@cache_app.command()
def cache(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or a shipped one: quickstart.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Processes; each loads the base. Half the cores, at most 4.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")] = False,
) -> None:
    """Encode a run's images and captions without training; the same command goes on where it was cut."""
    settings = load_config(config, set_ or [])
    quiet_libraries()
    from sdlora.cli.progress import JsonLines, ProgressBar
    from sdlora.run.fill_cache import fill_cache

    view = JsonLines(sys.stdout) if json_ else ProgressBar(Console(stderr=True))
    count = workers or min(4, max(1, (os.cpu_count() or 1) // 2))
    with view:
        for event in fill_cache(settings, count):
            view.show(event)
