"""The copy check of a finished LoRA file of any trainer against its training images.

Does for one file what a run does after every epoch; the base model is sampled as well, as the baseline of the signals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from sdlora.config.schema import RunConfig
from sdlora.errors import ConfigError
from sdlora.events import EpochDone, Event, Notice
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import LoraFile
from sdlora.run.preview_requests import drawn_as, preview_request
from sdlora.run.setup import fresh_base, load, make_checker, make_validation, sibling_of


def check_file(file: LoraFile, config: RunConfig, output: Path) -> Iterator[Event]:
    """Draw previews with a LoRA and compare them with the images of a folder.

    Args:
        config: `base`, `data`, `preview`, `copycheck` and `cache` are used.
        output: Folder for `previews` and `copycheck.json`; those of the base go to `base` in it.

    Yields:
        Progress, notices and finally a `CopyChecked`.

    Raises:
        SdloraError: The file, the images or the base cannot be used, or do not belong together.
    """
    if not (config.preview.enabled and config.copycheck.enabled):
        raise ConfigError("A check needs previews: set preview.enabled and copycheck.enabled to true.")
    loaded = load(config, partial(fresh_base, allows_distilled=True))
    config = drawn_as(config, type(loaded.base))
    adapter = attach(loaded.base.network, file, text_encoders=loaded.base.text_encoders)
    validation = make_validation(config, loaded, adapter)
    request = preview_request(config.preview, loaded.images.training)
    request = replace(request, sibling=sibling_of(config, loaded, adapter))
    checker = make_checker(config, loaded, adapter, request, validation)
    for message in loaded.notices:
        yield Notice(message)
    yield from checker.prepare(config.data.background)
    if validation is not None:
        yield from validation.data.fill(config.data.background)
        validation.measure(EpochDone(1, 0, None, None, 0.0))
    with adapter.disabled():
        yield from checker.epoch(0, output / "base", output / "base")
    yield from checker.epoch(1, output, output / "base", is_trained_here=False)
