"""Resuming a run: what must be the same as when it was started, and its newest checkpoint.

Used by the run, before and after its caches are filled.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdlora.config.schema import RunConfig
from sdlora.config.toml import FREE_WHEN_RESUMING, load_config, options
from sdlora.copycheck.verdict import EpochCheck
from sdlora.errors import ConfigError, DataError, OutputError
from sdlora.run.folder import RunFolder
from sdlora.run.lengthen import with_length
from sdlora.run.setup import RunContext
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.trainer import Trainer

_LENGTH = ("train.epochs", "train.exposures")


def pinned(config: RunConfig, revision: str | None) -> RunConfig:
    """The configuration with the commit that a hub id was resolved to, so that resuming finds the same base model."""
    if revision is None:
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"revision": revision})})


def resumed_config(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration to resume a run with: on the commit it was started on, unless it names a commit itself.

    It may have more epochs than the run was started with; see `with_length`.

    Raises:
        ConfigError: Another setting that matters differs from those the run was started with; all are named with both
            values.
    """
    started = load_config(str(folder.config))
    config = with_length(config, started, folder)
    if not (config.base.revision and re.fullmatch(r"[0-9a-f]{40}", config.base.revision)):
        config = pinned(config, started.base.revision)
    before = dict(options(started))
    different = [
        f"  {name}: was {before.get(name)!r}, now {value!r}"
        for name, value in options(config)
        if name not in (*FREE_WHEN_RESUMING, *_LENGTH) and before.get(name) != value
    ]
    if different:
        raise ConfigError(f"The run in {folder.path} was started with other settings:\n" + "\n".join(different))
    return config


def image_identities(context: RunContext) -> dict[str, str]:
    """A hash of pixels, mask, caption and networks of all images of a run, by name."""
    found: dict[str, str] = {}
    for term in context.trainer.terms:
        found |= term.loss.data.identities()
    if context.validation is not None:
        found |= {f"held out: {name}": identity for name, identity in context.validation.data.identities().items()}
    return found


def check_same_content(extra: dict[str, Any], context: RunContext) -> None:
    """Check that base model and images, in a filled cache, are those that a checkpoint with `extra` was made with.

    Raises:
        SdloraError: They are not, or the base model's own previews were never checked.
    """
    hashes = extra.get("lora_files", {})
    if changed := [name for name, content in context.lora_hashes.items() if hashes.get(name) != content]:
        raise OutputError(
            f"The run was started with other LoRA files: the content of {', '.join(changed)} has changed since. Put "
            "the old one back, or start a new run."
        )
    # A hash of the UNet's weights; the other networks are part of the images' hashes.
    before, now = extra.get("base"), context.loaded.identity
    if before not in (None, now):
        raise OutputError(
            f"The run was started with another base: the UNet's weights in {context.config.base.path!r} have changed "
            f"since (hash {before}, now {now}). Put the old ones back, or start a new run."
        )
    # The schedule depends on all images.
    old, new = extra["pictures"], image_identities(context)
    kinds = {
        "added": sorted(new.keys() - old.keys()),
        "no longer there": sorted(old.keys() - new.keys()),
        "changed, or its caption": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
    if any(kinds.values()):
        found = "\n".join(f"  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        raise DataError(f"The run was started with other images. Put them back, or start a new run:\n{found}")
    folder = context.folder
    # Epochs are compared with what the copy check found in the base model's previews, before training.
    if context.checker is not None and EpochCheck.read(folder.epoch(0)) is None:
        raise OutputError(
            f"The run in {folder.path} was started by a version without the copy check, so the base's images are not "
            f"checked. To resume without the check, write [copycheck] and enabled = false into {folder.config} and add "
            "--set copycheck.enabled=false; or start a new run."
        )


def load_newest(checkpoints: Sequence[Path], trainer: Trainer) -> dict[str, Any] | None:
    """Restore a trainer from the main process's newest checkpoint, in every process alike.

    `checkpoints`, oldest first, are empty in the other processes, which are sent the checkpoint if any of them, on
    another machine, does not see the folder. Returns what the run had kept in it; None if there is no checkpoint.
    """
    processes = trainer.processes
    newest = processes.agree(list(checkpoints[-1:]))
    if not newest:
        return None
    if not processes.any(not newest[0].is_dir()):
        return load_checkpoint(newest[0], trainer)
    files = {file.name: file.read_bytes() for file in newest[0].iterdir()} if processes.is_main else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in processes.agree(files).items():
            (Path(folder) / name).write_bytes(content)
        return load_checkpoint(Path(folder), trainer)
