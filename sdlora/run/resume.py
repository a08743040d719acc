"""Going on where a run stopped: what must be the same as before, and what is said where it is not.

Used by `run`.
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
from sdlora.run.setup import Parts
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.trainer import Trainer


def pinned(config: RunConfig, revision: str | None) -> RunConfig:
    """The configuration with the commit that a hub id was resolved to, so that going on finds the same base."""
    if revision is None:
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"revision": revision})})


def as_pinned(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration with the commit that the run was started on, unless it asks for a commit itself."""
    asks = config.base.revision is not None and re.fullmatch(r"[0-9a-f]{40}", config.base.revision)
    return config if asks else pinned(config, load_config(str(folder.config)).base.revision)


def check_same(config: RunConfig, folder: RunFolder) -> None:
    """A run goes on only with the settings it was started with.

    Raises:
        ConfigError: Any setting that matters differs; all are named with both values.
    """
    before = dict(options(load_config(str(folder.config))))
    different = [
        f"  {name}: was {before[name]!r}, now {value!r}"
        for name, value in options(config)
        if name not in FREE_WHEN_RESUMING and before[name] != value
    ]
    if different:
        raise ConfigError(f"The run in {folder.path} was started with other settings:\n" + "\n".join(different))


def images_of(parts: Parts) -> dict[str, str]:
    """What is trained, preserved and held out, by name: a hash of pixels, caption and networks."""
    validation = {} if parts.validation is None else parts.validation.data.identities()
    prior = {} if parts.prior is None else parts.prior.identities()
    return parts.data.identities() | prior | {f"held out: {name}": found for name, found in validation.items()}


def _check_same_base(before: str | None, parts: Parts) -> None:
    """A run goes on only with the base it was started with.

    Raises:
        OutputError: Its UNet's weights are others. (Those of the other networks are told by the images.)
    """
    if before not in (None, parts.identity):
        raise OutputError(
            f"The run was started with another base: the UNet's weights in {parts.config.base.path!r} have changed "
            f"since (hash {before}, now {parts.identity}). Put the old ones back, or start a new run."
        )


def _check_base_was_judged(parts: Parts) -> None:
    """Epochs are compared with what the check found in the base's images, before training.

    Raises:
        OutputError: The base's images were not checked, since the run was begun by a version without the check.
    """
    if parts.checker is not None and EpochCheck.read(parts.folder.epoch(0)) is None:
        raise OutputError(
            f"The run in {parts.folder.path} was begun before the copy check existed, so that the base's images are "
            f"not judged. Write [copycheck] and enabled = false into {parts.folder.config}, and go on with --set "
            "copycheck.enabled=false; or start a new run."
        )


def _check_same_images(before: dict[str, str], now: dict[str, str]) -> None:
    """A run goes on only with the images it was started with, for which image comes when depends on all of them.

    Raises:
        DataError: Any was added, taken away or changed; all are named.
    """
    kinds = {
        "added": sorted(now.keys() - before.keys()),
        "no longer there": sorted(before.keys() - now.keys()),
        "changed, or its caption": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    if any(kinds.values()):
        told = "\n".join(f"  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        raise DataError(f"The run was started with other images. Put them back, or start a new run:\n{told}")


def check_same_content(extra: dict[str, Any], parts: Parts) -> None:
    """See that base and images are those that a checkpoint was made with.

    Args:
        extra: What the run had kept in the checkpoint.
        parts: Of the run as it is now, its cache filled.

    Raises:
        SdloraError: They are not, or the base's images were never judged.
    """
    _check_same_base(extra.get("base"), parts)
    _check_same_images(extra["pictures"], images_of(parts))
    _check_base_was_judged(parts)


def load_newest(checkpoints: Sequence[Path], trainer: Trainer) -> dict[str, Any] | None:
    """Put a trainer back to where the main process's newest checkpoint was written, in every process alike.

    Args:
        checkpoints: The main process's, oldest first; nothing in the others, to which it is sent if any of them, on
            another machine, does not see the folder.
        trainer: Of this process.

    Returns:
        What the run had kept in the checkpoint; None if there is none.
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
