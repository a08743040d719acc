"""The command `sdlora check`: whether a finished LoRA copies the images it was trained on.

Exit code 7 says that it does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError, OutputError
from sdlora.events import CopyChecked

EXIT_COPYING = 7

check_app = typer.Typer()


@check_app.command()
def check(
    lora: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA .safetensors file of any trainer.")],
    data: Annotated[str, typer.Option(metavar="DIR", help="The images that it was trained on, or builtin:NAME.")],
    base: Annotated[str, typer.Option(help="The base: pocket, a checkpoint, a diffusers folder, or a hub id.")],
    validation_folder: Annotated[
        str | None,
        typer.Option(
            "--validation-folder", "--holdout", metavar="DIR", help="Images of the same kind that were not trained on."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New prompts to draw, one per line; made up if left out.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting, such as preview.num_steps=10."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder for the previews; checks/NAME by default.")] = None,
    missing_alpha: Annotated[
        str | None,
        typer.Option(metavar="rank|NUMBER", help="The alpha of modules whose file tells none; refused without it."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a LoRA's images with those it was trained on; exit code 7 if it copies."""
    folder = output or Path("checks") / lora.stem
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already. Choose a new folder with --output.")
    quiet_libraries()
    from sdlora.cli.progress import ProgressBar
    from sdlora.copycheck.verdict import EpochCheck
    from sdlora.lora_files.read import read_file
    from sdlora.run.check_file import check_file

    document: dict[str, Any] = {
        "base": {"path": base},
        # Whatever is in the folder may have been trained.
        "data": {"folder": data, "validation_folder": validation_folder, "validation_split": False},
        "preview": {"prompts": _lines(prompts) if prompts else []},
    }
    file = read_file(lora, missing_alpha)
    phrase = file.metadata.get("modelspec.trigger_phrase")
    # Where there are several, none belongs before a caption that holds none.
    if phrase is not None and ", " not in phrase:
        document["data"]["trigger"] = phrase
    config = parse_config(document, name="check", overrides=set_ or [])
    with ProgressBar(Console(stderr=True)) as view:
        for event in check_file(file, config, folder):
            if not isinstance(event, CopyChecked):  # told below, in full
                view.show(event)
    found = EpochCheck.read(folder)
    assert found is not None, "the check has just written it"
    if json_:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        _tell(found, folder)
    if found.verdict == "copying":
        raise typer.Exit(EXIT_COPYING)


def _lines(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {file} cannot be read as text. Give a file with one prompt per line.") from error
    if not any(found):
        raise ConfigError(f"--prompts: {file} holds no prompt. Write one per line.")
    return [line for line in found if line]


def _tell(found: Any, folder: Path) -> None:
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    table = Table("preview", "prompt", "most alike", "likeness", "by chance", box=None, pad_edge=False)
    for match in found.previews:
        style = "bold red" if match.significant else ""
        cells = [
            match.file.rpartition("/")[2],
            match.prompt,
            match.nearest,
            f"{match.similarity:.2f}",
            f"{match.p_value:.1%}",
        ]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    console.print(table)
    for signal in found.signals.values():
        console.print(Text(("! " if signal["outside"] else "  ") + signal["meaning"]))
    console.print(Text(f"{found.verdict}: {found.reason}"))
    console.print(Text(f"Previews: {folder / 'previews'}"))
