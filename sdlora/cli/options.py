"""Arguments and options that several commands share, and how commands print to stderr.

The first module of the command line: every command imports it, and it loads nothing heavy.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A TOML file, or a built-in configuration: quickstart.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable.")
]
JsonEvents = Annotated[bool, typer.Option("--json", help="Print events as JSON lines on stdout.")]
JsonResult = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MissingAlpha = Annotated[
    str | None,
    typer.Option(metavar="rank|NUMBER", help="Alpha of modules without one in the file, which is otherwise refused."),
]


def terminal(*, stdout: bool = False, quiet: bool = False) -> Console:
    """A console on stderr, or stdout, that prints texts as they are: brackets and colons in paths are no markup."""
    return Console(stderr=not stdout, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_message(message: str) -> None:
    """Print a message on stderr as it is, without breaking lines."""
    terminal().print(message)
