"""The command `sdlora data`: what is wrong with a folder of images, before training.

Exit code 3 means that training would refuse the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli.options import JsonResult
from sdlora.common.bundled import resolve_data_folder
from sdlora.config.schema_data import DataConfig
from sdlora.errors import DataError

if TYPE_CHECKING:
    from sdlora.data.checks import Finding


class Masks(StrEnum):
    """The values of data.masks."""

    NONE = "none"
    ALPHA = "alpha"
    FILE = "file"


def data(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of images, or builtin:NAME.")],
    trigger: Annotated[str | None, typer.Option(help="The word that every caption should contain.")] = None,
    resolution_px: Annotated[
        int | None, typer.Option("--resolution-px", min=16, max=4096, help="Training size; also checks image sizes.")
    ] = None,
    masks: Annotated[
        Masks, typer.Option(help="Where masks are: nowhere, in alpha channels, or in NAME-mask.png files.")
    ] = Masks.NONE,
    json_: JsonResult = False,
) -> None:
    """Check a folder of images and captions.

    Exits with code 3 if training would refuse the folder.
    """
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
        _print_findings(findings, {"image": checkup.num_files, "caption": num_captions, "bucket": num_buckets})
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(DataError.exit_code)


def _print_findings(findings: Sequence[Finding], counts: Mapping[str, int | None]) -> None:
    """Print errors, then warnings, then a line that counts everything."""
    from sdlora.data.checks import NUM_NAMED

    totals = []
    for severity in ("error", "warning"):
        chosen = [finding for finding in findings if finding.severity == severity]
        if chosen:
            totals.append(_count(len(chosen), severity))
            typer.echo(f"{severity.capitalize()}s:")
        for finding in chosen:
            typer.echo(f"  {finding.message}")
            if len(finding.files) > NUM_NAMED:
                typer.echo(f"    All: {', '.join(finding.files)}")
    seen = ", ".join(_count(number, noun) for noun, number in counts.items() if number is not None)
    typer.echo(f"{seen}: {', '.join(totals) or 'no problems found'}.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
