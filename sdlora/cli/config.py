"""The commands `sdlora config show` and `sdlora config schema`: configurations as text and as a schema."""

from __future__ import annotations

import json

import typer

from sdlora.cli.options import ConfigArgument, Overrides
from sdlora.config.toml import dump_toml, json_schema, load_config

config_app = typer.Typer(help="Print a configuration or the schema of all settings.", no_args_is_help=True)


@config_app.command("show")
def show(config: ConfigArgument, set_: Overrides = None) -> None:
    """Print the complete configuration as TOML, with a comment on every setting."""
    typer.echo(dump_toml(load_config(config, set_ or [])), nl=False)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of configurations."""
    typer.echo(json.dumps(json_schema(), indent=2))
