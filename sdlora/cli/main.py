"""The command line: all commands, and what becomes of errors.

Results and JSON go to stdout, everything else to stderr; exit codes are those of `sdlora.errors`.
"""

from __future__ import annotations

import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from sdlora.cli import files
from sdlora.cli.check import check
from sdlora.cli.config import config_app, plan, presets
from sdlora.cli.data import caption, data
from sdlora.cli.import_ import import_
from sdlora.cli.options import print_message
from sdlora.cli.runs import batch, cache, push, train, ui
from sdlora.common.process import EXIT_INTERRUPTED, is_main_process
from sdlora.common.version import __version__
from sdlora.errors import RenamedOptionWarning, SdloraError

EXIT_INTERNAL = 1

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for _command in (train, presets, ui, data, caption, plan, cache, check, batch, push, files.info, files.convert):
    app.command()(_command)
app.command(name="import")(import_)
app.command(cls=files.WeightsCommand)(files.merge)
app.command()(files.resize)
app.command()(files.extract)
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdlora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train LoRAs for Stable Diffusion, and check every epoch for copies.

    Start with: sdlora train quickstart
    """


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print each warning about a renamed option once, as one line without its location in the code."""
    printed: set[str] = set()
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *location: Any, **rest: Any) -> None:
            if not issubclass(category, RenamedOptionWarning):
                show_others(message, category, *location, **rest)
            elif str(message) not in printed and is_main_process():
                printed.add(str(message))
                print_message(f"Warning: {message}")

        warnings.simplefilter("always", RenamedOptionWarning)
        warnings.showwarning = show
        yield


def _print_anything() -> None:
    """Escape what the terminal cannot show, such as invalid characters in file names; JSON is always ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; errors become one message and an exit code, never a traceback."""
    _print_anything()
    try:
        with _short_warnings():
            app()
    except SdloraError as error:
        print_message(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_message("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # A new name each time: in a shared folder, someone else might have put a link under a predictable one.
        file, details = tempfile.mkstemp(prefix="sdlora-error-", suffix=".txt")
        with open(file, "w", encoding="utf-8") as handle:  # noqa: PTH123
            handle.write(traceback.format_exc())
        print_message(f"Internal error: {type(error).__name__}: {error}. This is a bug in sdlora; details: {details}")
        sys.exit(EXIT_INTERNAL)
