"""The command `sdlora plan`: what a run needs, before it is run."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from sdlora.common.quiet import quiet_libraries
from sdlora.config.toml import load_config, parse_config
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.run.estimate import Forecast

plan_app = typer.Typer()

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_PARTS = {
    "weights": "frozen weights",
    "adapter": "adapter, gradients and optimizer",
    "activations": "activations of the largest step",
    "caches": "cached latents and text",
    "overhead": "work buffers of kernels",
    "previews": "previews, encoding or proof, beyond the step",
}


@plan_app.command()
def plan(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A TOML file, or a shipped one; or give --family.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; repeatable.")
    ] = None,
    family: Annotated[
        Literal["sd1", "sd2", "sdxl"] | None, typer.Option(help="A family of bases instead; no weights are needed.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=16, max=4096, help="Training size of --family.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of --family; 8 if left out.")] = None,
    targets: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Targets of --family; cross_attention if left out.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a pass with --family; 1 if left out.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The device's memory, such as 8GiB; found out if left out.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a run needs: memory, numbers, steps and time; nothing is trained."""
    memory_bytes = None if memory is None else size_bytes(memory)
    given = {"data.resolution_px": resolution, "lora.rank": rank, "train.batch_size": batch_size}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    if targets is not None:
        overrides.append(f"lora.targets={json.dumps(targets.split(','))}")
    if (config is None) == (family is None):
        raise ConfigError("Give a configuration, as in 'sdlora plan quickstart', or --family sd1, sd2 or sdxl.")
    if config is not None:
        if overrides:
            raise ConfigError("--resolution, --rank, --targets and --batch-size go with --family; use --set.")
        settings = load_config(config, set_ or [])
    else:
        document: dict[str, Any] = {"data": {"folder": "none"}}
        settings = parse_config(document, name="plan", overrides=[*overrides, *(set_ or [])])
    quiet_libraries()
    from sdlora.run.estimate import forecast_config, forecast_family

    found = forecast_family(family, settings, memory_bytes) if family else forecast_config(settings, memory_bytes)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        _tell(found)


def size_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB, 7.5 GB or 8589934592.

    Raises:
        ConfigError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"--memory: {text!r} is no size. Write it as 8GiB, 12GB or a number of bytes.")
    return round(float(match[1]) * _UNITS[match[2]])


def _tell(found: Forecast) -> None:
    from sdlora.common.text import format_seconds

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    if found.images is not None:
        sizes = ", ".join(f"{count} of {size}" for size, count in found.buckets.items())
        console.print(
            f"{found.images} images ({sizes}), each seen {found.exposures_per_image} times: {found.steps} steps."
        )
    share = found.trainable_parameters / found.base_parameters
    whole, added = found.largest_layer
    console.print(
        f"{found.trainable_parameters:,} numbers are trained, {share:.2%} of the base's {found.base_parameters:,}; in "
        f"the largest adapted layer {added:,} beside {whole:,}."
    )
    table = Table("memory", "GiB", box=None, pad_edge=False)
    for part, count in found.parts.items():
        table.add_row(_PARTS[part], f"{count / 2**30:.2f}")
    table.add_row("together, at the peak", f"{found.peak_bytes / 2**30:.2f}")
    console.print(table)
    if found.memory_bytes is not None:
        verdict = "It fits" if found.fits else "It does not fit"
        console.print(f"{verdict} into {found.memory_bytes / 2**30:.2f} GiB.")
    for change in found.changes:
        console.print(
            f"  with {change.change}: {change.peak_bytes / 2**30:.2f} GiB, {change.time:.2f} times the arithmetic "
            f"per image ({change.price})"
        )
    if found.fits is False and not (found.changes and found.changes[-1].peak_bytes <= (found.memory_bytes or 0)):
        console.print("  No setting makes it fit. Take a smaller base, or a device with more memory.")
    console.print(
        f"Full fine-tuning would hold {found.full_training_bytes / 1e9:.1f} GB before any activation: 16 bytes for "
        "every number of the base."
    )
    if found.seconds is not None:
        console.print(f"Training takes about {format_seconds(found.seconds)} here, without previews and caching.")
    if found.cache_bytes is not None:
        console.print(f"The cache takes {found.cache_bytes / 2**20:.1f} MiB on the disk.")
