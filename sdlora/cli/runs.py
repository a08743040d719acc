"""The commands around runs: `sdlora train`, `cache`, `batch`, `push`, and the studio.

Each parses its options and hands over to `sdlora.run`, `sdlora.batch` or `sdlora.ui`, which take seconds to import:
a misspelt option should not cost them.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdlora.cli.options import ConfigArgument, JsonEvents, Overrides, print_message, terminal
from sdlora.common.process import exit_code_of, is_main_process, quiet_libraries, stop_signals
from sdlora.common.remote import open_run
from sdlora.common.text import parse_bytes
from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from sdlora.batch.engine import Engine
    from sdlora.config.schema import RunConfig

EXIT_NOT_ALL_DONE = 8


def train(
    config: ConfigArgument,
    set_: Overrides = None,
    output: Annotated[str | None, typer.Option(help="Run folder or URL; runs/NAME by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Exit at once if another run uses the GPU.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Train with settings that are made for another family of base models.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit into, such as 8GiB: settings follow from it.")
    ] = None,
    json_: JsonEvents = False,
) -> None:
    """Train a LoRA.

    Ctrl-C saves a checkpoint; the same command with --resume continues from it.
    """
    overrides = [*(set_ or []), *(["base.family=any"] if force else [])]
    settings = load_config(config, overrides)
    quiet_libraries()
    if memory is not None:
        settings = load_config(config, [*overrides, *_to_fit(settings, memory)])
    from sdlora.cli.progress import JsonLines, ProgressBar, copy_table
    from sdlora.copycheck.verdict import read_checks
    from sdlora.run.run import Stopped, start

    location = output or str(Path("runs") / (settings.name or "lora"))
    folder, mirrored = open_run(location, resume=resume)
    console = terminal(quiet=not is_main_process())
    view = JsonLines(sys.stdout) if json_ else ProgressBar(console)
    with stop_signals(console.print) as stop_signal, view:
        try:
            # Closed, so that the run records how it ended wherever it is interrupted.
            with closing(
                start(settings, folder, resume=resume, wait=not no_wait, should_stop=lambda: stop_signal() is not None)
            ) as events:
                for event in mirrored(events):
                    view.show(event)
        except (Stopped, KeyboardInterrupt) as end:
            if (folder / "config.toml").is_file():
                hint = f"To resume: {resume_command(config, location, set_ or [], force=force, memory=memory)}"
            else:
                hint = "Nothing was written yet."
            with suppress(OSError):  # the terminal may be gone
                lost = "" if isinstance(end, Stopped) else " Steps since the last checkpoint are lost."
                console.print(f"Stopped.{lost} {hint}")
            raise typer.Exit(exit_code_of(stop_signal())) from None
    if not json_ and (checks := read_checks(folder / "epochs")):
        console.print(copy_table(checks))


def _to_fit(settings: RunConfig, memory: str) -> list[str]:
    """The settings that make a run fit into memory, as `--set` takes them; each change is printed."""
    from sdlora.run.estimate import changes_to_fit

    try:
        memory_bytes = parse_bytes(memory)
    except ConfigError as error:
        raise ConfigError(f"--memory: {error}") from error
    changes = changes_to_fit(settings, memory_bytes)
    for change in changes:
        print_message(f"To fit into {memory}: {change}.")
    return [override for change in changes for override in change.overrides()]


def resume_command(
    config: str, output: str, overrides: Sequence[str], *, force: bool, memory: str | None = None
) -> str:
    """The command that resumes a run that was started with these arguments, quoted for a shell."""
    sets = [word for override in overrides for word in ("--set", override)]
    return shlex.join(
        [
            *("sdlora", "train", config, "--output", output, "--resume", *sets),
            *(["--force"] if force else []),
            *(["--memory", memory] if memory else []),
        ]
    )


def cache(
    config: ConfigArgument,
    set_: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Processes, which load the base model each; half the cores, up to 4."),
    ] = None,
    json_: JsonEvents = False,
) -> None:
    """Encode a run's images and captions without training.

    The same command continues after an interruption.
    """
    settings = load_config(config, set_ or [])
    quiet_libraries()
    from sdlora.cli.progress import JsonLines, ProgressBar
    from sdlora.run.fill_cache import fill_cache

    count = workers or min(4, max(1, (os.cpu_count() or 1) // 2))
    with JsonLines(sys.stdout) if json_ else ProgressBar(terminal()) as view:
        for event in fill_cache(settings, count):
            view.show(event)


def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS.toml", help="Jobs file; see docs/scaling.md.")],
    output: Annotated[
        str | None, typer.Option(help="Folder or URL of the batch; runs/NAME by default, after the file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try one step of every job, and estimate what the batch takes.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed jobs again.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where jobs run: this machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster; by default one is started on this machine.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(min=0.0, help="GPUs per job on Ray; 1 by default if the cluster has any.")
    ] = None,
    json_: JsonEvents = False,
) -> None:
    """Train many LoRAs from a file of jobs.

    The same command continues where it stopped. Exits with code 8 if not every job is done.
    """
    from sdlora.batch.jobs import read_jobs

    planned = read_jobs(jobs)
    from sdlora.batch.batch import run_batch
    from sdlora.batch.engine import environments, run_here
    from sdlora.batch.location import Location
    from sdlora.batch.table import BatchTable
    from sdlora.cli.progress import JsonLines

    location = Location(output or str(Path("runs") / jobs.stem))
    if dry_run:
        quiet_libraries()
        from sdlora.batch.dry_run import print_estimates

        print_estimates(planned, location.folder, json_=json_)
        return
    console = terminal()
    view = JsonLines(sys.stdout) if json_ else BatchTable(console)
    chosen: Engine
    if engine == "ray":
        from sdlora.batch.engine import RayEngine

        chosen = RayEngine(location, address, gpus).run
    else:
        chosen = partial(run_here, logs=location.folder / "workers", environments=environments())
    summary: dict[str, Any] = {}
    with stop_signals(console.print) as stop_signal, view:
        messages = run_batch(planned, location, chosen, retry=retry, should_stop=lambda: stop_signal() is not None)
        for message in messages:
            view.show(message)
            summary = message
    total = sum(len(summary[key]) for key in ("done", "failed", "open"))
    print_message(f"{len(summary['done'])} of {total} jobs are done.")
    for key, label in (("failed", "failed"), ("open", "left")):
        if summary[key]:
            print_message(f"{len(summary[key])} {label}: {', '.join(summary[key])}.")
    print_message(f"Results: {summary['folder']}/report.html")
    if stop_signal() is not None and summary["open"]:
        print_message("Run the same command again to resume.")
        raise typer.Exit(exit_code_of(stop_signal()))
    if summary["failed"] or summary["open"]:
        raise typer.Exit(EXIT_NOT_ALL_DONE)


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
    from sdlora.run.export import files_to_push, push_run
    from sdlora.run.folder import RunFolder

    folder = RunFolder(run, load_config(str(run / "config.toml")).name or "lora")
    files = files_to_push(folder)
    typer.echo(f"{push_run(folder, repo, private=not public)}: {', '.join(files)}.")


def ui(
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's own, it needs --auth-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 7860,
    auth_file: Annotated[
        Path | None, typer.Option("--auth-file", metavar="FILE", help="A file with one line, NAME:PASSWORD.")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder for runs and images.")] = Path("runs"),
    store: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Store that recipes may read images from, such as s3://BUCKET; repeatable."),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Proxy in front of the studio, whose X-Forwarded-For is believed."),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
) -> None:
    """Open the studio: prepare, train and compare in a browser."""
    print_message("Starting the studio; this takes a few seconds …")
    # It is installed inside this package and lies beside it in a checkout, where a type checker does not see it.
    access = importlib.import_module("sdlora.ui.server.access")
    entrance = access.open_entrance(
        host=host, port=port, auth_file=auth_file, stores=store or (), trusted_proxies=trusted_proxy or ()
    )
    gc.disable()  # a fifth of the time that loading takes would go into looking for garbage
    quiet_libraries()
    server = importlib.import_module("sdlora.ui.server.server")
    gc.enable()
    address = f"http://[{host}]" if ":" in host else f"http://{host}"

    def opened(port: int) -> None:
        print_message(f"The studio is at {address}:{port} (Ctrl-C closes it; runs continue)")
        if not no_browser and _has_screen():
            webbrowser.open(f"http://localhost:{port}" if host in ("0.0.0.0", "::") else f"{address}:{port}")

    server.serve(runs=runs, entrance=entrance, opened=opened)


def _has_screen() -> bool:
    """Whether somebody sits at this machine: a terminal without a desktop would get a browser of text in its way."""
    has_desktop = sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return sys.stderr.isatty() and has_desktop and "SSH_CONNECTION" not in os.environ
