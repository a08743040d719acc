"""The commands for configurations: `sdlora config` prints them, `sdlora plan` estimates what a run of one needs.

The estimates are `sdlora.run.estimate`'s; this module parses the options and prints.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from sdlora.cli.options import ConfigArgument, JsonResult, Overrides, terminal
from sdlora.common.bundled import BUILTIN_BASES
from sdlora.common.families import Family
from sdlora.common.process import quiet_libraries
from sdlora.common.text import format_bytes, format_seconds, parse_bytes, sparkline
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config, parse_config
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.run.estimate import Estimate

_PARTS = {
    "weights": "frozen weights",
    "adapter": "adapter, gradients and optimizer",
    "activations": "activations of the largest step",
    "caches": "cached latents and text embeddings",
    "overhead": "work buffers of kernels",
    "previews": "previews, encoding or verification, beyond the step",
}

# What a PCIe 4.0 link of 16 lanes carries in a second, in practice.
_LINK_BYTES = 24e9

config_app = typer.Typer(help="Print a configuration or the schema of all settings.", no_args_is_help=True)


@config_app.command("show")
def show(config: ConfigArgument, set_: Overrides = None) -> None:
    """Print the complete configuration as TOML, with a comment on every setting."""
    typer.echo(dump_toml(load_config(config, set_ or [])), nl=False)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of configurations."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def presets(json_: JsonResult = False) -> None:
    """List the configurations that come with sdlora, and what they need.

    The time is the least that this machine's arithmetic allows for 20 images, without previews.
    """
    quiet_libraries()

    from sdlora.config.presets import presets as shipped
    from sdlora.run.estimate import device_rate

    rate = device_rate()
    rows = []
    for preset in shipped():
        config = load_config(preset.name, [] if preset.family in BUILTIN_BASES else ["data.folder=none"])
        exposures = config.train.exposures or config.data.repeats_range[1] * config.train.epochs
        seconds = 20 * exposures * preset.flops_per_exposure / rate
        rows.append({**preset._asdict(), "exposures": exposures, "least_seconds": round(seconds)})
    if json_:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = terminal(stdout=True)
    table = Table("preset", "teaches", "GPU memory", "20 images here", box=None, pad_edge=False)
    for row in rows:
        figures = format_bytes(row["peak_bytes"]), f"at least {format_seconds(row['least_seconds'])}"
        table.add_row(row["name"], row["purpose"].partition(",")[0].rstrip("."), *figures)
    console.print(table)
    console.print(
        "\nFor example: sdlora train sdxl-character --set base.path=CHECKPOINT.safetensors --set data.folder=IMAGES "
        "--set data.trigger=WORD",
        soft_wrap=True,
    )


def plan(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A TOML file, or a built-in configuration; or give --family."),
    ] = None,
    set_: Overrides = None,
    family: Annotated[Family | None, typer.Option(help="A model family instead; needs no weights.")] = None,
    resolution: Annotated[int | None, typer.Option(min=16, max=4096, help="Training size, with --family.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank, with --family; default 8.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Targets, with --family; default: the family's."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass, with --family; default 1.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit into, such as 8GiB; default: what is free here.")
    ] = None,
    json_: JsonResult = False,
) -> None:
    """Estimate the memory, steps, time and disk space of a run.

    Nothing is trained.
    """
    try:
        memory_bytes = None if memory is None else parse_bytes(memory)
    except ConfigError as error:
        raise ConfigError(f"--memory: {error}") from error
    given = {"data.resolution_px": resolution, "lora.rank": rank, "train.batch_size": batch_size}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    if targets is not None:
        overrides.append(f"lora.targets={json.dumps(targets.split(','))}")
    if (config is None) == (family is None):
        raise ConfigError(
            f"Give a configuration, as in 'sdlora plan quickstart', or --family {', '.join(get_args(Family))}."
        )
    if config is not None:
        if overrides:
            raise ConfigError("--resolution, --rank, --targets and --batch-size go with --family; use --set.")
        settings = load_config(config, set_ or [])
    else:
        assert family is not None
        quiet_libraries()
        from sdlora.models.families import CLASSES

        own = list(CLASSES[family].default_targets)
        document: dict[str, Any] = {"data": {"folder": "none"}, "lora": {"targets": own}}
        settings = parse_config(document, name="plan", overrides=[*overrides, *(set_ or [])])
    quiet_libraries()
    from sdlora.run.estimate import estimate_config, estimate_shapes

    found = estimate_shapes(settings, family, memory_bytes) if family else estimate_config(settings, memory_bytes)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)


def _print(found: Estimate) -> None:
    console = terminal(stdout=True)
    if found.images is not None:
        sizes = ", ".join(f"{count} of {size}" for size, count in found.buckets.items())
        console.print(
            f"{found.images} images ({sizes}), each seen {found.exposures_per_image} times: {found.steps} steps."
        )
    share = found.trainable_parameters / found.base_parameters
    whole, added = found.largest_layer
    console.print(
        f"{found.trainable_parameters:,} parameters are trained, {share:.2%} of the base model's "
        f"{found.base_parameters:,}; in the largest adapted layer {added:,} beside {whole:,}."
    )
    console.print(f"Layers: {', '.join(f'{count} {kind}' for kind, count in found.layers.items())}.")
    if found.rates:
        first, *_, last = found.rates
        console.print(f"Learning rate: {sparkline(found.rates)}, from {first:.2g} to {last:.2g}.")
    table = Table("memory", "GiB", box=None, pad_edge=False)
    for part, num_bytes in found.parts.items():
        table.add_row(_PARTS[part], f"{num_bytes / 2**30:.2f}")
    table.add_row("peak", f"{found.peak_bytes / 2**30:.2f}")
    console.print(table)
    if found.transferred_bytes:
        console.print(
            f"In each step {format_bytes(found.transferred_bytes)} of weights are copied to the device, which takes "
            f"{found.transferred_bytes / _LINK_BYTES:.1f} s on a PCIe 4.0 card with 16 lanes unless computing takes "
            "longer."
        )
    if found.memory_bytes is not None:
        verdict = "It fits" if found.fits else "It does not fit"
        console.print(f"{verdict} into {format_bytes(found.memory_bytes)}.")
    for change in found.changes:
        console.print(
            f"  with {change.change}: {format_bytes(change.peak_bytes)}, {change.time:.2f} times the arithmetic per "
            f"image ({change.price})"
        )
    for kind, errors in found.packing_errors.items():
        measured = f"{errors[0]:.1%}, as measured on a few of this base's layers"
        typical = (
            f"{errors[0]:.1%} where weights are normally distributed, {errors[-1]:.1%} where they have heavy tails"
        )
        console.print(
            f"{kind} moves the outputs of the layers it packs by {measured if len(errors) == 1 else typical}."
        )
    if found.fits is False and not found.can_fit:
        console.print("  No setting makes it fit. Use a smaller base model, or a device with more memory.")
    console.print(
        f"Full fine-tuning would hold {format_bytes(found.full_training_bytes)} before any activation: 16 bytes for "
        "every parameter of the base model."
    )
    if found.seconds is not None:
        console.print(f"Training takes about {format_seconds(found.seconds)} here, without previews and caching.")
    if found.looking_share is not None:
        console.print(
            f"Previews, validation and the copy check take {found.looking_share:.0%} of the training's arithmetic."
        )
    if found.chance_to_notice:
        chances = ", ".join(f"{chance:.0%} where {share} are" for share, chance in found.chance_to_notice.items())
        console.print(
            "The chance that the copy check notices an epoch whose images are copies, if it finds every copy: "
            f"{chances}. Copying depends on how often each image is seen and on the learning rate (docs/copy-check.md)."
        )
    if found.cache_bytes is not None:
        console.print(f"The cache takes up to {format_bytes(found.cache_bytes)} of disk space.")
