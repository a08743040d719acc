"""The commands that work with models of others and with the Hub: `sdlora caption` and `sdlora push`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import load_config
from sdlora.errors import OutputError

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
    from sdlora.run.folder import RunFolder
    from sdlora.run.push import files_to_push, push_run

    folder = RunFolder(run, load_config(str(run / "config.toml")).name or "lora")
    files = files_to_push(folder)
    url = push_run(folder, repo, private=not public)
    typer.echo(f"{url}: {', '.join(files)}.")


@hub_app.command()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images.")],
    model: Annotated[str, typer.Option(metavar="ID", help="An image-to-text model: a hub id, or a folder.")],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What a chat model is asked, or what other models' captions begin with."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=500, help="The longest caption.")] = 60,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write anew what is in .txt files already; they are kept if left out.")
    ] = False,
) -> None:
    """Write a caption beside every image that has none, by a model of your choice."""
    quiet_libraries()
    import torch

    from sdlora.cli.progress import ProgressBar
    from sdlora.common.device_lock import device_lock, take_turns
    from sdlora.data.captioner import Captioner, images_to_caption, write_captions
    from sdlora.events import Notice

    # Looked at first: a model may take minutes to load.
    images = images_to_caption(folder, overwrite=overwrite)
    if not images:
        typer.echo(f"Every image in {folder} has a caption. Write them anew with --overwrite.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passed_over = 0
    with ExitStack() as held, ProgressBar(Console(stderr=True)) as view:
        if (lock := device_lock(device)) is not None:
            for notice in take_turns(lock, "sdlora caption", held, wait=True, should_stop=lambda: False):
                view.show(notice)
        captioner = Captioner(model, device=device, prompt=prompt, max_tokens=max_tokens)
        for event in write_captions(images, captioner, overwrite=overwrite):
            passed_over += isinstance(event, Notice)
            view.show(event)
    written = len(images) - passed_over
    told = "1 caption" if written == 1 else f"{written} captions"
    typer.echo(f"{told} written. Read them before you train: a model sees what it expects.")
