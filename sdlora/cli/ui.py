"""The command `sdlora ui`: serves the studio to a browser."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli.options import print_message
from sdlora.common.quiet import quiet_libraries


def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own, it needs --auth-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 7860,
    auth_file: Annotated[
        Path | None, typer.Option("--auth-file", metavar="FILE", help="A file with one line, NAME:PASSWORD.")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder for runs and images.")] = Path("runs"),
) -> None:
    """Open the studio: prepare, train and compare in a browser."""
    quiet_libraries()
    # It is installed inside this package and lies beside it in a checkout, where a type checker does not see it.
    server = importlib.import_module("sdlora.ui.server.server")
    shown_host = f"[{host}]" if ":" in host else host

    def opened(port: int) -> None:
        print_message(f"The studio is at http://{shown_host}:{port} (Ctrl-C closes it; runs continue)")

    server.serve(runs=runs, host=host, port=port, auth_file=auth_file, opened=opened)
