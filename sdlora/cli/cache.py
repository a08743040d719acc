"""The command `sdlora cache`: encodes everything that a run needs, before the run."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from sdlora.cli.options import ConfigArgument, JsonEvents, Overrides
from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import load_config


def cache(
    config: ConfigArgument,
    set_: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Processes, which load the base model each; half the cores, up to 4."),
    ] = None,
    json_: JsonEvents = False,
) -> None:
    """Encode a run's images and captions without training.

    The same command continues after an interruption.
    """
    settings = load_config(config, set_ or [])
    quiet_libraries()
    from sdlora.cli.progress import JsonLines, ProgressBar
    from sdlora.run.fill_cache import fill_cache

    count = workers or min(4, max(1, (os.cpu_count() or 1) // 2))
    with JsonLines(sys.stdout) if json_ else ProgressBar(Console(stderr=True)) as view:
        for event in fill_cache(settings, count):
            view.show(event)
