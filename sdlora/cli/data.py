"""The commands for images: `sdlora data` checks a folder of them before training, `sdlora caption` captions them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdlora.cli.options import JsonResult, Overrides, terminal
from sdlora.common.bundled import resolve_data_folder
from sdlora.common.process import quiet_libraries
from sdlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sdlora.data.batches import Bucket
    from sdlora.data.checks import Finding, Image

_MODEL_OPTIONS = ("prompt", "max_tokens")
_TAGGER_OPTIONS = ("trigger", "general_threshold", "character_threshold", "with_", "exclude")


def data(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of images, or builtin:NAME.")],
    trigger: Annotated[str | None, typer.Option(help="The word that every caption should contain.")] = None,
    resolution_px: Annotated[
        int | None, typer.Option("--resolution-px", min=16, max=4096, help="Training size; also checks image sizes.")
    ] = None,
    masks: Annotated[
        Literal["none", "alpha", "file"],
        typer.Option(help="Where masks are: nowhere, in alpha channels, or in NAME-mask.png files."),
    ] = "none",
    overrides: Overrides = None,
    json_: JsonResult = False,
) -> None:
    """Check a folder of images and captions, or every set of a folder of kohya's REPEATS_NAME folders.

    Exits with code 3 if training would refuse the folder.
    """
    from sdlora.config.toml import parse_config
    from sdlora.data.batches import assign_buckets
    from sdlora.data.captions import fixed_captions
    from sdlora.data.checks import NUM_NAMED, copies_between, examine
    from sdlora.data.fit import examine_lengths, examine_sizes

    given = {"trigger": trigger, "resolution_px": resolution_px, "masks": masks}
    document = {"data": {"folder": folder} | {key: value for key, value in given.items() if value is not None}}
    settings = parse_config(document, name="data", overrides=overrides or ()).data
    counts = {"image": 0, "caption": 0}
    findings: list[Finding] = []
    sizes: dict[str, Bucket] = {}
    sets: dict[str, Sequence[Image]] = {}
    texts: dict[str, list[str]] = {}
    buckets: dict[str, list[Bucket]] = {}
    for source in settings.sets:
        checkup = examine(
            resolve_data_folder(source.folder), background=settings.background, caption=source.caption,
            trigger=source.trigger, allow_trigger_only=settings.allow_trigger_only, masks=settings.masks,
            recursive=source.recursive, exclude=source.exclude, options=source.captions,
        )  # fmt: skip
        counts["image"] += checkup.num_files
        counts["caption"] += sum(image.caption is not None for image in checkup.images)
        findings += [finding.of_set(source.name) for finding in checkup.findings]
        sets[source.name or ""] = checkup.images
        options = source.sizes or settings.bucket_options
        edges = options.resolutions_px or (() if settings.resolution_px is None else (settings.resolution_px,))
        columns = [assign_buckets([image.size for image in checkup.images], edge, options) for edge in edges]
        for image, *found in zip(checkup.images, *columns, strict=True) if edges else ():
            buckets[source.prefix + image.name] = found
        for image in checkup.images:
            sizes[source.prefix + image.name] = image.size
            texts[source.prefix + image.name] = fixed_captions(image.caption or "", source.captions, source.trigger)
    findings += copies_between(sets)
    findings += examine_lengths(_num_tokens(texts, settings.max_token_windows), settings.max_token_windows * 75 + 2)
    if buckets:
        largest = {name: max(own, key=prod) for name, own in buckets.items()}
        findings += examine_sizes({name: sizes[name] for name in largest}, largest)
        counts["bucket"] = len({bucket for own in buckets.values() for bucket in own})
    chosen = {kind: [f for f in findings if f.severity == kind] for kind in ("error", "warning")}
    if json_:
        report = {
            "folder": str(resolve_data_folder(folder)),
            "pictures": counts["image"],
            "findings": [asdict(f) for f in findings],
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        for severity in filter(chosen.get, chosen):
            typer.echo(f"{severity.capitalize()}s:")
            for finding in chosen[severity]:
                typer.echo(f"  {finding.message}")
                if len(finding.files) > NUM_NAMED:
                    typer.echo(f"    All: {', '.join(finding.files)}")
        seen = ", ".join(_count(number, noun) for noun, number in counts.items())
        totals = ", ".join(_count(len(some), severity) for severity, some in chosen.items() if some)
        typer.echo(f"{seen}: {totals or 'no problems found'}.")
    if chosen["error"]:
        raise typer.Exit(DataError.exit_code)


def _num_tokens(texts: Mapping[str, Sequence[str]], num_windows: int) -> dict[str, int]:
    """The length of each image's longest text in CLIP's tokens, start and end included, if it may exceed windows."""
    # A token has at least one byte, so most folders need no tokenizer.
    long = {name: some for name, some in texts.items() if max(len(text.encode()) for text in some) > 75 * num_windows}
    if not long:
        return {}
    from sdlora.models.unet import clip_tokenizer

    tokenizer = clip_tokenizer("<|endoftext|>")
    return {
        name: max(len(tokenizer(text, truncation=False, verbose=False).input_ids) for text in some)
        for name, some in long.items()
    }


def caption(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images.")],
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="An image-to-text model: a hub id, or a folder.")
    ] = None,
    tagger: Annotated[
        str | None,
        typer.Option(metavar="ID", help="A booru tagger of the WD14 family instead: a hub id, or a folder."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The question for a chat model, or the beginning of other models' captions."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=500, help="Maximum length of a caption in tokens.")
    ] = 60,
    trigger: Annotated[
        str | None, typer.Option(metavar="WORD", help="Tagger: the word in front of all captions.")
    ] = None,
    general_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Tagger: the lowest probability of general tags.")
    ] = 0.35,
    character_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Tagger: that of characters, artists and copyrights.")
    ] = 0.85,
    with_: Annotated[
        str, typer.Option("--with", metavar="CATEGORY,...", help="Tagger: also write rating, artist or copyright.")
    ] = "",
    exclude: Annotated[str, typer.Option(metavar="TAG,...", help="Tagger: tags that are never written.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions in existing .txt files.")] = False,
) -> None:
    """Caption the images that have no caption, with a model or a booru tagger."""
    if (model is None) == (tagger is None):
        raise ConfigError("Give one of --model, for captions in sentences, and --tagger, for booru tags.")
    own, foreign = ("--model", _TAGGER_OPTIONS) if tagger is None else ("--tagger", _MODEL_OPTIONS)
    given = [name for name in foreign if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        options = ", ".join("--" + name.strip("_").replace("_", "-") for name in given)
        raise ConfigError(f"{options} cannot be combined with {own}.")
    include = _split(with_)
    quiet_libraries()
    import torch

    from sdlora.cli.progress import ProgressBar
    from sdlora.common.locks import device_lock, take_turns
    from sdlora.data.captioner import Captioner, CaptionModel, images_to_caption, write_captions
    from sdlora.data.tagger import OPTIONAL_CATEGORIES, TagSettings, load_tagger
    from sdlora.events import Notice

    if unknown := [name for name in include if name not in OPTIONAL_CATEGORIES]:
        raise ConfigError(f"--with is {', '.join(unknown)!r}; it takes {', '.join(OPTIONAL_CATEGORIES)}.")
    # Before the model is loaded, which may take minutes.
    images = images_to_caption(folder, overwrite=overwrite)
    if not images:
        typer.echo(f"Every image in {folder} has a caption. Use --overwrite to replace them.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skipped = 0
    with ExitStack() as held, ProgressBar(terminal()) as view:
        if (lock := device_lock(device)) is not None:
            for notice in take_turns(lock, "sdlora caption", held, wait=True, should_stop=lambda: False):
                view.show(notice)
        captioner: CaptionModel
        if tagger:
            settings = TagSettings(general_threshold, character_threshold, trigger, frozenset(include), _split(exclude))
            captioner = load_tagger(tagger, settings, device=device)
        else:
            assert model is not None
            captioner = Captioner(model, device=device, prompt=prompt, max_tokens=max_tokens)
        for event in write_captions(images, captioner, overwrite=overwrite):
            skipped += isinstance(event, Notice)
            view.show(event)
    typer.echo(f"{_count(len(images) - skipped, 'caption')} written. Read them before you train: models make mistakes.")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
