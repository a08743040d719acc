"""The command line's tools for LoRA files: `sdlora info`, `convert`, `merge`, `resize`, `extract`.

Every output is a new file or folder, written completely or not at all; the loss of accuracy is printed on stdout.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from sdlora.cli.options import JsonResult, MissingAlpha, print_message
from sdlora.common.process import quiet_libraries
from sdlora.common.text import format_range
from sdlora.errors import ConfigError, DataError, OutputError

if TYPE_CHECKING:
    from sdlora.lora_files.algebra import Cost

_BASE = "A diffusers folder, or a single .safetensors checkpoint"
_NUMBERS = re.compile(r"[-+]?[\d.][-+\d.,e]*")


FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors file of any trainer.")]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="The .safetensors file to write; it must not exist yet.")
]


def info(file: FileArgument, json_: JsonResult = False) -> None:
    """Print what a LoRA file contains."""
    quiet_libraries()
    from sdlora.lora_files.read import describe_lora, large_header_note

    description = describe_lora(file)
    if (note := large_header_note(file)) is not None:
        print_message(f"Warning: {note}")
    if json_:
        typer.echo(json.dumps(description, indent=2))
        return
    width = max(len(key) for key in description)
    for key, value in description.items():
        if isinstance(value, dict):
            value = "".join(f"\n  {name}: {_short(str(entry))}" for name, entry in value.items())
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")


def _short(text: str) -> str:
    """A metadata entry as a line; of an image, only the size."""
    return f"an image of {len(text) * 3 // 4} bytes" if text.startswith("data:image/") else text


def convert(
    file: FileArgument,
    out: OutArgument,
    to: Annotated[Literal["kohya", "peft"], typer.Option(help="The names to write.")],
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Base model as a diffusers folder; by default that of the file's family."),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Type to store weights in; unchanged by default.")
    ] = None,
    peft_folder: Annotated[
        Path | None,
        typer.Option(
            "--peft-folder", metavar="DIR", help="With --to peft, also write what PeftModel.from_pretrained loads."
        ),
    ] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Rename a LoRA's tensors: kohya's names or PEFT's.

    Every program reads kohya's names; diffusers and PEFT read PEFT's. Metadata beyond the 1 MiB that programs read is
    left out, the longest entries first.
    """
    _check_output(out)
    if peft_folder is not None and to == "kohya":
        raise ConfigError("--peft-folder takes PEFT's names. Add --to peft.")
    if peft_folder is not None and peft_folder.exists():
        raise OutputError(f"{peft_folder} already exists. Choose another folder, or move it away.")
    quiet_libraries()
    import torch

    from sdlora.lora_files.base_weights import paths_for
    from sdlora.lora_files.elsewhere import write_peft_folders
    from sdlora.lora_files.read import (
        DTYPES_BY_NAME,
        parse_lora,
        read_file,
        read_tensors,
        transformer_family,
        without_alpha,
    )
    from sdlora.lora_files.write import write_file

    source = read_file(file, missing_alpha)
    family = transformer_family(source.state, source.metadata)
    if to == "kohya" and family is not None:
        raise DataError(
            f"{file.name} is of {family.title}, whose LoRAs no program reads under kohya's names. --to peft writes "
            "the form that all of them read, with alpha / rank in B."
        )
    needs_paths = family is None and (to == "peft" or base is not None)
    paths = paths_for(source.state, base, source.metadata) if needs_paths else None
    dtype = source.dtype if precision is None else DTYPES_BY_NAME[precision]
    left_out = write_file(
        out, source.state, metadata=source.metadata, dtype=dtype, paths=paths if to == "peft" else None
    )
    same = dtype in (source.dtype, torch.float32)
    change = "weights unchanged" if same else f"weights rounded to {dtype}".replace("torch.", "")
    unknown = () if missing_alpha is None else without_alpha(parse_lora(*read_tensors(file), name=file.name))
    given = "unchanged" if not unknown else f"set to {missing_alpha} in {len(unknown)} modules"
    given = given if family is None else "multiplied into B"
    typer.echo(f"{out}: {len(source.state)} modules under {to} names, {change}, alphas {given}.")
    if left_out:
        typer.echo(f"Left out of the metadata, of which programs read at most 1 MiB: {', '.join(left_out)}.")
    if peft_folder is not None:
        written = ", ".join(str(place) for place in write_peft_folders(out, peft_folder))
        typer.echo(f"For PeftModel.from_pretrained: {written}.")


class WeightsCommand(TyperCommand):
    """A command whose --weights takes any number of values, such as `--weights 1 0.5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the values into one word, since the parser has no options with a variable number of values."""
        if "--weights" in args:
            start = args.index("--weights") + 1
            end = start
            while end < len(args) and (_NUMBERS.fullmatch(args[end]) or (end == start and args[end][:1] != "-")):
                end += 1
            args = [*args[:start], " ".join(args[start:end]), *args[end:]]
        return super().parse_args(ctx, args)


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="LoRA .safetensors files of any trainer.")],
    output: Annotated[
        Path, typer.Option(help="The .safetensors file to write; with --into, a folder or a file like BASE.")
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="W ...", help="One factor per file, such as 1 0.5; 1 by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Reduce the sum to this rank; exact by default.")] = None,
    into: Annotated[Path | None, typer.Option(metavar="BASE", help=f"{_BASE}; writes a merged copy of it.")] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Merge LoRAs into one file, or into a base model."""
    factors = _parse_weights(weights, len(files))
    if into is None or into.is_file():
        _check_output(output)
    if into is not None and rank is not None:
        raise ConfigError(
            "--rank has no effect with --into, which adds the exact sum to the base model. Remove one of them."
        )
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.base_weights import base_weights
    from sdlora.lora_files.merge import merge_into
    from sdlora.lora_files.read import family_of, read_file
    from sdlora.lora_files.write import metadata_of_new_ranks, write_file

    sources = [read_file(file, missing_alpha) for file in files]
    for source in sources:
        algebra.refuse_dora(source.state, source.name)
    families = {family: source.name for source in sources if (family := family_of(source.state, source.metadata))}
    if len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise DataError(f"{first} is for {one} and {second} for {other}: LoRAs of different families cannot be merged.")
    state, cost = algebra.merge([source.state for source in sources], factors, rank)
    if into is not None:
        num_layers = merge_into(base_weights(into), output, state)
        typer.echo(f"{output}: {num_layers} layers changed, summed in float32 and rounded to the base model's type.")
        return
    if state is sources[0].state:
        write_file(output, state, metadata=sources[0].metadata, dtype=sources[0].dtype)
    else:
        write_file(output, state, metadata=metadata_of_new_ranks(sources))
    _print_result(output, [weights.down.shape[0] for weights in state.values()], None if rank is None else cost)


def resize(
    file: FileArgument,
    out: OutArgument,
    rank: Annotated[int | None, typer.Option(help="Maximum rank of each module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Lowest rank that keeps this share of a module's squared singular values.")
    ] = None,
    missing_alpha: MissingAlpha = None,
) -> None:
    """Reduce the rank of a LoRA."""
    _check_output(out)
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.read import read_file
    from sdlora.lora_files.write import metadata_of_new_ranks, write_file

    source = read_file(file, missing_alpha)
    algebra.refuse_dora(source.state, file.name)
    state, cost = algebra.resize(source.state, rank=rank, energy=energy)
    write_file(out, state, metadata=metadata_of_new_ranks([source]))
    _print_result(out, [weights.down.shape[0] for weights in state.values()], cost)


def extract(
    fine_tuned: Annotated[Path, typer.Argument(metavar="FINE_TUNED", help=f"{_BASE}.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model it was fine-tuned from, in either form.")],
    out: OutArgument,
    rank: Annotated[int, typer.Option(help="Maximum rank of each module.")],
) -> None:
    """Extract a LoRA from a fine-tuned base model."""
    _check_output(out)
    quiet_libraries()
    from sdlora.lora_files import algebra
    from sdlora.lora_files.base_weights import base_weights
    from sdlora.lora_files.merge import differences
    from sdlora.lora_files.write import write_file
    from sdlora.models.families import FAMILIES, family_on_disk

    found, others = differences(base_weights(fine_tuned), base_weights(base))
    state, cost = algebra.extract(found, rank)
    metadata, family = {"ss_sd_model_name": base.resolve().name}, family_on_disk(str(base))
    if family is not None and FAMILIES[family].lora_prefix is not None:
        metadata["modelspec.architecture"] = f"{FAMILIES[family].modelspec}/lora"
    write_file(out, state, metadata=metadata)
    _print_result(out, [weights.down.shape[0] for weights in state.values()], cost)
    if others:
        typer.echo(
            f"Left out, because a LoRA cannot hold them: {len(others)} other weights that differ, such as {others[0]}."
        )


def _check_output(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise OutputError(f"{path} does not end in .safetensors; programs identify LoRA files by that extension.")
    if path.exists():
        raise OutputError(f"{path} already exists. Choose another name, or move the file away.")


def _parse_weights(weights: str | None, num_files: int) -> list[float]:
    if weights is None:
        return [1.0] * num_files
    try:
        found = [float(word) for word in weights.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--weights is {weights!r}; it takes numbers, such as 1 0.5.") from error
    if len(found) != num_files:
        raise ConfigError(
            f"--weights has {len(found)} numbers for {num_files} files. Give one per file, such as 1 0.5."
        )
    if not all(abs(factor) < float("inf") for factor in found):
        raise ConfigError(f"--weights is {weights!r}; it takes finite numbers.")
    return found


def _print_result(file: Path, ranks: list[int], cost: Cost | None) -> None:
    """Print the ranks of a written file's modules and its loss of accuracy, which is None if it is exact."""
    typer.echo(f"{file}: ranks {format_range(min(ranks), max(ranks))} in {len(ranks)} modules.")
    if cost is None:
        typer.echo("Exact up to float32 rounding.")
        return
    worst = f", at most {cost.worst:.3g} in a module ({cost.worst_module})" if cost.worst_module else ""
    typer.echo(f"Kept {cost.kept_energy:.4%} of the energy; relative error {cost.relative_error:.3g} in total{worst}.")
