"""The command line: `sdlora train`, `batch`, `cache`, `data`, `config`, `plan`, `check`, and the tools for files.

Results and JSON go to stdout, everything else to stderr; exit codes are those of `sdlora.errors`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sdlora import __version__
from sdlora.cli.batch import batch_app
from sdlora.cli.cache import cache_app
from sdlora.cli.check import check_app
from sdlora.cli.files import tools_app
from sdlora.cli.hub import hub_app
from sdlora.cli.plan import plan_app
from sdlora.cli.ui import ui_app
from sdlora.common.bundled import resolve_data_folder
from sdlora.common.quiet import is_main_process, quiet_libraries
from sdlora.common.remote import open_run
from sdlora.common.signals import EXIT_INTERRUPTED, exit_code_of, stop_signals
from sdlora.config.schema_data import DataConfig
from sdlora.config.toml import dump_toml, json_schema, load_config
from sdlora.errors import DataError, RenamedOptionWarning, SdloraError

if TYPE_CHECKING:
    from sdlora.data.checks import Finding


class Masks(StrEnum):
    """The values of data.masks."""

    NONE = "none"
    ALPHA = "alpha"
    FILE = "file"


EXIT_INTERNAL = 1

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(check_app)
app.add_typer(batch_app)
app.add_typer(cache_app)
app.add_typer(hub_app)
app.add_typer(plan_app)
app.add_typer(tools_app)
app.add_typer(ui_app)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file, or a shipped one: quickstart.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdlora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train LoRAs for diffusion models, and see what they learned."""


@app.command()
def train(
    config: ConfigArgument,
    set_: Overrides = None,
    output: Annotated[str | None, typer.Option(help="The run's folder or URL; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="End at once if another run is on the GPU.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")] = False,
) -> None:
    """Train a LoRA from a configuration."""
    settings = load_config(config, set_ or [])
    # Only now: loading torch and diffusers takes seconds, which a misspelt key should not cost.
    quiet_libraries()
    from sdlora.cli.progress import JsonLines, ProgressBar, copy_table
    from sdlora.copycheck.verdict import read_checks
    from sdlora.run.run import Stopped, start

    place = output or str(Path("runs") / (settings.name or "lora"))
    folder, mirrored = open_run(place, resume=resume)
    console = Console(stderr=True, highlight=False, quiet=not is_main_process())
    view = JsonLines(sys.stdout) if json_ else ProgressBar(console)
    with stop_signals(lambda text: console.print(text, markup=False, soft_wrap=True)) as stop_signal, view:
        try:
            stopping = lambda: stop_signal() is not None  # noqa: E731
            events = start(settings, folder, resume=resume, wait=not no_wait, should_stop=stopping)
            for event in mirrored(events):
                view.show(event)
        except Stopped:
            begun = (folder / "config.toml").is_file()
            go_on = f"Go on with: sdlora train {config} --output {place} --resume" if begun else "Nothing was begun."
            console.print(f"Stopped. {go_on}", markup=False, soft_wrap=True)
            raise typer.Exit(exit_code_of(stop_signal())) from None
    if not json_ and (checks := read_checks(folder / "epochs")):
        console.print(copy_table(checks))


@app.command()
def data(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of images, or a shipped set: builtin:NAME.")],
    trigger: Annotated[str | None, typer.Option(help="The word that captions should hold.")] = None,
    resolution_px: Annotated[
        int | None, typer.Option("--resolution-px", min=16, max=4096, help="Training size, to look at sizes as well.")
    ] = None,
    masks: Annotated[
        Masks, typer.Option(help="Where masks are: nowhere, in the alpha channels, or in NAME-mask.png files.")
    ] = Masks.NONE,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a folder of images before it is trained; exit code 3 if it would be refused."""
    path, settings = resolve_data_folder(folder), DataConfig()
    from sdlora.data.buckets import assign_buckets
    from sdlora.data.checks import examine, examine_sizes

    checkup = examine(path, background=settings.background, trigger=trigger, masks=masks.value)
    findings, num_buckets = list(checkup.findings), None
    if resolution_px is not None:
        sizes = {image.path.name: image.size for image in checkup.images}
        found = assign_buckets(list(sizes.values()), resolution_px, settings.bucket_step_px, buckets=settings.buckets)
        findings += examine_sizes(sizes, dict(zip(sizes, found, strict=True)))
        num_buckets = len(set(found))
    if json_:
        report = {"folder": str(path), "pictures": checkup.num_files, "findings": [asdict(f) for f in findings]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        num_captions = sum(image.caption is not None for image in checkup.images)
        _tell_findings(findings, {"image": checkup.num_files, "caption": num_captions, "bucket": num_buckets})
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(DataError.exit_code)


def _tell_findings(findings: Sequence[Finding], counts: Mapping[str, int | None]) -> None:
    """Print errors, then warnings, then a last line that counts everything."""
    from sdlora.data.checks import NUM_NAMED

    def count(number: int, what: str) -> str:
        return f"{number} {what}" if number == 1 else f"{number} {what}s"

    told = []
    for severity in ("error", "warning"):
        chosen = [finding for finding in findings if finding.severity == severity]
        if chosen:
            told.append(count(len(chosen), severity))
            typer.echo(f"{severity.capitalize()}s:")
        for finding in chosen:
            typer.echo(f"  {finding.message}")
            if len(finding.files) > NUM_NAMED:
                typer.echo(f"    All: {', '.join(finding.files)}")
    seen = ", ".join(count(number, what) for what, number in counts.items() if number is not None)
    typer.echo(f"{seen}: {', '.join(told) or 'nothing to mend'}.")


@config_app.command("show")
def config_show(config: ConfigArgument, set_: Overrides = None) -> None:
    """Print the whole configuration, defaults included, as TOML."""
    typer.echo(dump_toml(load_config(config, set_ or [])), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configurations."""
    typer.echo(json.dumps(json_schema(), indent=2))


def _say(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning about a renamed option once, as one line without its place in the code."""
    said: set[str] = set()
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
            if not issubclass(category, RenamedOptionWarning):
                show_others(message, category, *place, **rest)
            elif str(message) not in said and is_main_process():
                said.add(str(message))
                _say(f"Warning: {message}")

        warnings.simplefilter("always", RenamedOptionWarning)
        warnings.showwarning = show
        yield


def main() -> None:
    """Run the command line; errors become one message and an exit code, never a traceback."""
    try:
        with _plain_warnings():
            app()
    except SdloraError as error:
        _say(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # A new name each time: in a folder that all share, someone else might have put a link under a known one.
        file, details = tempfile.mkstemp(prefix="sdlora-error-", suffix=".txt")
        with open(file, "w", encoding="utf-8") as handle:  # noqa: PTH123
            handle.write(traceback.format_exc())
        _say(
            f"Internal error: {type(error).__name__}: {error}. This is a fault of sdlora's; {details} has the details."
        )
        sys.exit(EXIT_INTERNAL)
