"""The command `sdlora ui`: the studio, in a browser."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdlora.common.quiet import quiet_libraries

ui_app = typer.Typer()


@ui_app.command()
def ui(
    host: Annotated[
        str, typer.Option(help="Where to listen; anything but this machine needs --auth-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 7860,
    auth_file: Annotated[
        Path | None, typer.Option("--auth-file", metavar="FILE", help="A file with one line, NAME:PASSWORD.")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Where runs and images are kept.")] = Path("runs"),
) -> None:
    """Open the studio: images, recipe, training and results in a browser."""
    quiet_libraries()
    # It is installed inside of this package and lies beside it in a checkout, where a type checker does not see it.
    server = importlib.import_module("sdlora.ui.server.server")
    shown = f"[{host}]" if ":" in host else host

    def opened(port: int) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"The studio is at http://{shown}:{port} (Ctrl-C closes it; trainings go on)", markup=False
        )

    server.serve(runs=runs, host=host, port=port, auth_file=auth_file, opened=opened)
