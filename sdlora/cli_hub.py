"""The commands that work with models of others and with the Hub: `sdlora caption` and `sdlora push`.

Floor 8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.configfile import load_config
from sdlora.errors import OutputError
from sdlora.quiet import quiet_libraries

hub_app = typer.Typer()


@hub_app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Where on the Hub, as owner/name; made if it is not there.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; private if left out.")
    ] = False,
) -> None:
    """Upload a run's LoRA, its model card and the card's previews to the Hugging Face Hub."""
    if not (run / "config.toml").is_file():
        raise OutputError(f"{run} is no run's folder: it holds no config.toml.")
    quiet_libraries()
    from sdlora.push import files_to_push, push_run
    from sdlora.runfolder import RunFolder

    folder = RunFolder(run, load_config(str(run / "config.toml")).name or "lora")
    files = files_to_push(folder)
    url = push_run(folder, repo, private=not public)
    typer.echo(f"{url}: {', '.join(files)}.")
