"""The commands that use the Hugging Face Hub: `sdlora caption` and `sdlora push`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import load_config
from sdlora.errors import OutputError


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Repository on the Hub, as owner/name; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public instead of private.")] = False,
) -> None:
    """Upload a finished run to the Hugging Face Hub.

    The LoRA file, the model card and the previews in it are uploaded, and nothing else.
    """
    if not (run / "config.toml").is_file():
        raise OutputError(
            f"{run} is not a run folder: it has no config.toml. Give a finished run, such as runs/quickstart."
        )
    quiet_libraries()
    from sdlora.run.folder import RunFolder
    from sdlora.run.push import files_to_push, push_run

    folder = RunFolder(run, load_config(str(run / "config.toml")).name or "lora")
    files = files_to_push(folder)
    url = push_run(folder, repo, private=not public)
    typer.echo(f"{url}: {', '.join(files)}.")


def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images.")],
    model: Annotated[str, typer.Option(metavar="ID", help="An image-to-text model: a hub id, or a folder.")],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The question for a chat model, or the beginning of other models' captions."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=500, help="Maximum length of a caption in tokens.")
    ] = 60,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions in existing .txt files.")] = False,
) -> None:
    """Caption the images that have no caption, with a model."""
    quiet_libraries()
    import torch

    from sdlora.cli.progress import ProgressBar
    from sdlora.common.device_lock import device_lock, take_turns
    from sdlora.data.captioner import Captioner, images_to_caption, write_captions
    from sdlora.events import Notice

    # Before the model is loaded, which may take minutes.
    images = images_to_caption(folder, overwrite=overwrite)
    if not images:
        typer.echo(f"Every image in {folder} has a caption. Use --overwrite to replace them.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skipped = 0
    with ExitStack() as held, ProgressBar(Console(stderr=True)) as view:
        if (lock := device_lock(device)) is not None:
            for notice in take_turns(lock, "sdlora caption", held, wait=True, should_stop=lambda: False):
                view.show(notice)
        captioner = Captioner(model, device=device, prompt=prompt, max_tokens=max_tokens)
        for event in write_captions(images, captioner, overwrite=overwrite):
            skipped += isinstance(event, Notice)
            view.show(event)
    written = len(images) - skipped
    captions = "1 caption" if written == 1 else f"{written} captions"
    typer.echo(f"{captions} written. Read them before you train: models make mistakes.")
