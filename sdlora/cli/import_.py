"""The command `sdlora import`: another trainer's configuration becomes one of ours.

Exit code 2 means that settings are left to decide.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sdlora.cli.options import JsonResult
from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Fate, Imported, Status
from sdlora.config.imports.write import as_toml, shown, shown_value
from sdlora.errors import ConfigError, OutputError

_HEADINGS = {
    Status.TRANSLATED: "Translated",
    Status.DROPPED: "Dropped",
    Status.REFUSED: "Refused, for you to decide",
    Status.UNKNOWN: "Unknown",
}


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A JSON, TOML or YAML file, or a text with a command.")],
    output: Annotated[
        Path | None, typer.Option(metavar="NAME.toml", help="The file to write; FILE's name with .toml by default.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write the file even if settings are refused or unknown, as comments.")
    ] = False,
    json_: JsonResult = False,
) -> None:
    """Translate a configuration of kohya_ss, sd-scripts, OneTrainer, ai-toolkit or a diffusers script.

    Prints what becomes of every setting. Exits with code 2 if some are left to decide.
    """
    imported = import_file(file)
    target = output or _default_output(file)
    if target.exists():
        raise OutputError(f"{target} exists already, and is not overwritten. Choose another name with --output.")
    writes = partial or not imported.open_keys
    if json_:
        typer.echo(json.dumps(_report(imported, str(target) if writes else None), indent=2, default=str))
    else:
        _print(imported)
    if not writes:
        raise ConfigError(
            f"Nothing was written, since these settings are left to decide: {', '.join(imported.open_keys)}. With "
            "--partial, the rest is written, and these become comments in the file."
        )
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(as_toml(imported, file.name))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    if not json_:
        typer.echo(f"Wrote {target}. To train: sdlora train {target}")


def _default_output(file: Path) -> Path:
    """The name of the file with .toml in the working directory, or another one if that is the file itself."""
    target = Path(f"{file.stem}.toml")
    return Path(f"{file.stem}-sdlora.toml") if target.absolute() == file.absolute() else target


def _print(imported: Imported) -> None:
    """Print what became of every key, by outcome."""
    typer.echo(f"From {imported.form}:")
    for status, heading in _HEADINGS.items():
        fates = [fate for fate in imported.fates if fate.status is status]
        if fates:
            typer.echo(f"\n{heading} ({len(fates)}):")
        if status is Status.DROPPED:
            for reason in dict.fromkeys(fate.reason for fate in fates):
                typer.echo(f"  {reason}: {', '.join(_given(fate) for fate in fates if fate.reason == reason)}")
        else:
            for fate in fates:
                typer.echo(f"  {_line(fate)}")
    typer.echo("")


def _given(fate: Fate) -> str:
    """A key with its value, as the file has it."""
    value = shown_value(fate)
    return f"{fate.key} = {value}" if value else fate.key


def _line(fate: Fate) -> str:
    """A key with its value, the options it became and the reason."""
    options = ", ".join(f"{name} = {shown(option)}" for name, option in fate.options.items())
    became = f" -> {options}" if options else ""
    return f"{_given(fate)}{'' if fate.given else ' (default)'}{became}{f': {fate.reason}' if fate.reason else ''}"


def _report(imported: Imported, output: str | None) -> dict[str, Any]:
    return {
        "form": imported.form,
        "output": output,
        "settings": [
            {
                "key": fate.key,
                "value": shown_value(fate),
                "given": fate.given,
                "status": fate.status.value,
                "options": dict(fate.options),
                "reason": fate.reason,
            }
            for fate in imported.fates
        ],
    }
