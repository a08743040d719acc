"""The command `sdlora train`: one run, from its configuration to its LoRA file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdlora.cli.options import ConfigArgument, JsonEvents, Overrides
from sdlora.common.quiet import is_main_process, quiet_libraries
from sdlora.common.remote import open_run
from sdlora.common.signals import exit_code_of, stop_signals
from sdlora.config.toml import load_config


def train(
    config: ConfigArgument,
    set_: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder or URL; runs/NAME by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit at once if another run uses the GPU.")] = False,
    json_: JsonEvents = False,
) -> None:
    """Train a LoRA.

    Ctrl-C saves a checkpoint; the same command with --resume continues from it.
    """
    settings = load_config(config, set_ or [])
    # Loading torch and diffusers takes seconds, which a misspelt key should not cost.
    quiet_libraries()
    from sdlora.cli.describe import copy_table
    from sdlora.cli.progress import JsonLines, ProgressBar
    from sdlora.copycheck.verdict import read_checks
    from sdlora.run.run import Stopped, start

    location = output or str(Path("runs") / (settings.name or "lora"))
    folder, mirrored = open_run(location, resume=resume)
    console = Console(stderr=True, highlight=False, quiet=not is_main_process())
    view = JsonLines(sys.stdout) if json_ else ProgressBar(console)
    with stop_signals(lambda text: console.print(text, markup=False, soft_wrap=True)) as stop_signal, view:
        try:
            events = start(
                settings, folder, resume=resume, wait=not no_wait, should_stop=lambda: stop_signal() is not None
            )
            for event in mirrored(events):
                view.show(event)
        except Stopped:
            if (folder / "config.toml").is_file():
                hint = f"To resume: sdlora train {config} --output {location} --resume"
            else:
                hint = "Nothing was written yet."
            console.print(f"Stopped. {hint}", markup=False, soft_wrap=True)
            raise typer.Exit(exit_code_of(stop_signal())) from None
    if not json_ and (checks := read_checks(folder / "epochs")):
        console.print(copy_table(checks))
