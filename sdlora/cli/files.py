"""The command line's tools for LoRA files: `sdlora info`, `convert`, `merge`, `resize`, `extract`.

Every output is a new file or folder, written whole or not at all; what it costs is said on stdout.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sdlora.common.quiet import quiet_libraries
from sdlora.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from sdlora.lora_files.algebra import Cost
    from sdlora.lora_files.read import LoraFile

tools_app = typer.Typer()
_BASE = "A folder in diffusers' layout, or a .safetensors checkpoint in one file"
_NUMBERS = re.compile(r"[-+]?[\d.][-+\d.,e]*")


class Spelling(StrEnum):
    """The two ways to name modules that sdlora writes."""

    KOHYA = "kohya"
    PEFT = "peft"


class Precision(StrEnum):
    """The types that files store."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors file of any trainer.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write; it must be new.")]
MissingAlpha = Annotated[
    str | None,
    typer.Option(metavar="rank|NUMBER", help="The alpha of modules whose file tells none; refused without it."),
]
BaseOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="The base, in diffusers' layout; the file's family if left out."),
]


@tools_app.command()
def info(
    file: FileArgument,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a LoRA file holds."""
    quiet_libraries()
    from sdlora.lora_files.read import describe_lora

    description = describe_lora(file)
    if json_:
        typer.echo(json.dumps(description, indent=2))
        return
    width = max(len(key) for key in description)
    for key, value in description.items():
        if isinstance(value, dict):
            value = {name: _short(entry) for name, entry in value.items()}
            value = "".join(f"\n  {name}: {entry}" for name, entry in value.items())
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")


def _short(value: Any) -> str:
    """A metadata entry as a line; an image in it is only told."""
    text = str(value)
    return f"an image of {len(text) * 3 // 4} bytes" if text.startswith("data:image/") else text


@tools_app.command()
def convert(
    file: FileArgument,
    out: OutArgument,
    to: Annotated[Spelling, typer.Option(help="Whose names to write.")],
    base: BaseOption = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Store the weights in another type; as they are if left out.")
    ] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Write a LoRA under other names: kohya's (read everywhere) or PEFT's."""
    _check_output(out)
    quiet_libraries()
    import torch

    from sdlora.lora_files.algebra import refuse_dora
    from sdlora.lora_files.base_folder import paths_for
    from sdlora.lora_files.read import DTYPES_BY_NAME, read_file
    from sdlora.lora_files.write import write_file

    source = read_file(file, missing_alpha)
    if to == Spelling.KOHYA:
        refuse_dora(source.state, file.name)
    paths = paths_for(source.state, base) if to == Spelling.PEFT or base is not None else None
    named = paths if to == Spelling.PEFT else None
    dtype = source.dtype if precision is None else DTYPES_BY_NAME[precision.value]
    write_file(out, source.state, metadata=source.metadata, dtype=dtype, paths=named)
    same = dtype in (source.dtype, torch.float32)
    told = "weights and alphas unchanged" if same else f"weights rounded to {dtype}".replace("torch.", "")
    typer.echo(f"{out}: {len(source.state)} modules under {to.value} names, {told}.")


class _Weights(TyperCommand):
    """A command whose --weights takes all numbers up to the next word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the numbers to the parser as one word, for it knows no options of many."""
        if "--weights" in args:
            start = args.index("--weights") + 1
            end = start
            while end < len(args) and (_NUMBERS.fullmatch(args[end]) or (end == start and args[end][:1] != "-")):
                end += 1
            args = [*args[:start], " ".join(args[start:end]), *args[end:]]
        return super().parse_args(ctx, args)


@tools_app.command(cls=_Weights)
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="LoRA .safetensors files of any trainer.")],
    output: Annotated[
        Path, typer.Option(help="The .safetensors file to write; with --into a folder or a file, as BASE is.")
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="W ...", help="One factor per file, as 1 0.5; 1 for all if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut the sum to this rank; exact if left out.")] = None,
    into: Annotated[Path | None, typer.Option(metavar="BASE", help=f"{_BASE}, to write a merged copy of.")] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Make one LoRA of several, or a base with LoRAs in its weights."""
    factors = _factors(weights, len(files))
    if into is None or into.is_file():
        _check_output(output)
    if into is not None and rank is not None:
        raise ConfigError("--rank has no use with --into: the sum goes into the base exactly. Leave one of them out.")
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.base_file import base_weights
    from sdlora.lora_files.merge import merge_into
    from sdlora.lora_files.read import read_file
    from sdlora.lora_files.write import metadata_of_new_ranks, write_file

    sources = [read_file(file, missing_alpha) for file in files]
    for source in sources:
        algebra.refuse_dora(source.state, source.name)
    _check_families(sources)
    state, cost = algebra.merge([source.state for source in sources], factors, rank)
    if into is not None:
        num_layers = merge_into(base_weights(into), output, state)
        typer.echo(f"{output}: {num_layers} layers changed, summed in float32 and rounded to the base's type.")
        return
    if state is sources[0].state:
        write_file(output, state, metadata=sources[0].metadata, dtype=sources[0].dtype)
    else:
        write_file(output, state, metadata=metadata_of_new_ranks(sources))
    typer.echo(f"{output}: ranks {_span([w.down.shape[0] for w in state.values()])} in {len(state)} modules.")
    typer.echo("Exact but for rounding to float32." if rank is None else _cost(cost))


@tools_app.command()
def resize(
    file: FileArgument,
    out: OutArgument,
    rank: Annotated[int | None, typer.Option(help="At most this many ranks per module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="As few ranks as keep this share of a module's squared singular values.")
    ] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Write a LoRA with fewer ranks."""
    _check_output(out)
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.read import read_file
    from sdlora.lora_files.write import metadata_of_new_ranks, write_file

    source = read_file(file, missing_alpha)
    algebra.refuse_dora(source.state, file.name)
    state, cost = algebra.resize(source.state, rank=rank, energy=energy)
    write_file(out, state, metadata=metadata_of_new_ranks([source]))
    typer.echo(f"{out}: ranks {_span(list(cost.ranks.values()))} in {len(state)} modules.")
    typer.echo(_cost(cost))


@tools_app.command()
def extract(
    fine_tuned: Annotated[Path, typer.Argument(metavar="FINE_TUNED", help=f"{_BASE}.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="What it was fine-tuned from, in either form.")],
    out: OutArgument,
    rank: Annotated[int, typer.Option(help="At most this many ranks per module.")],
) -> None:
    """Make a LoRA of what a fine-tuned base has learned."""
    _check_output(out)
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.base_file import base_weights
    from sdlora.lora_files.merge import differences
    from sdlora.lora_files.write import write_file

    found, others = differences(base_weights(fine_tuned), base_weights(base))
    state, cost = algebra.extract(found, rank)
    write_file(out, state, metadata={"ss_sd_model_name": base.resolve().name})
    typer.echo(f"{out}: ranks {_span(list(cost.ranks.values()))} in {len(state)} modules.")
    typer.echo(_cost(cost))
    if others:
        typer.echo(f"Left out, for no LoRA holds them: {len(others)} other weights that differ, such as {others[0]}.")


def _check_output(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise OutputError(f"{path} does not end in .safetensors, by which programs know LoRA files.")
    if path.exists():
        raise OutputError(f"{path} exists already. Give another name, or move it away.")


def _factors(weights: str | None, num_files: int) -> list[float]:
    if weights is None:
        return [1.0] * num_files
    try:
        found = [float(word) for word in weights.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--weights is {weights!r}: it takes numbers, as 1 0.5.") from error
    if len(found) != num_files:
        raise ConfigError(f"--weights gives {len(found)} numbers for {num_files} files. Give one per file, as 1 0.5.")
    if not all(abs(factor) < float("inf") for factor in found):
        raise ConfigError(f"--weights is {weights!r}: it takes finite numbers.")
    return found


def _check_families(sources: list[LoraFile]) -> None:
    from sdlora.lora_files.read import family_of

    families = {family: source.name for source in sources if (family := family_of(source.state)) is not None}
    if len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise DataError(f"{first} is for {one} and {second} for {other}: LoRAs of different families have no sum.")


def _cost(cost: Cost) -> str:
    worst = f", at most {cost.worst:.3g} in a module ({cost.worst_module})" if cost.worst_module else ""
    return f"Kept {cost.kept_energy:.4%} of the energy; relative error {cost.relative_error:.3g} in total{worst}."


def _span(ranks: list[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
