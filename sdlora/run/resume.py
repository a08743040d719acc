"""Resuming a run: what must be the same as when it was started, and its newest checkpoint.

Used by the run, before and after its caches are filled.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from sdlora.common.version import __version__
from sdlora.config.schema import RunConfig
from sdlora.config.toml import FREE_WHEN_RESUMING, RENAMED, dump_toml, load_config, options
from sdlora.copycheck.verdict import EpochCheck
from sdlora.errors import ConfigError, DataError, OutputError
from sdlora.run.folder import RunFolder
from sdlora.run.lengthen import with_length
from sdlora.run.setup import RunContext
from sdlora.training.checkpoint import load_checkpoint
from sdlora.training.trainer import Trainer

_LENGTH = ("train.epochs", "train.exposures")
# Images and base models may move: what they contain is compared.
_LOCATIONS = (
    "base.path",
    "base.components",
    "base.text_encoder",
    "base.vae",
    "preview.base",
    "data.folder",
    "data.validation_folder",
    "data.preservation_folder",
)
_NETWORKS = {"base": "UNet", "vae": "VAE", "text": "text encoder"}


def pinned(config: RunConfig, revision: str | None) -> RunConfig:
    """The configuration with the commit that a hub id was resolved to, so that resuming finds the same base model."""
    if revision is None:
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"revision": revision})})


def resumed_config(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration to resume a run with: on the commit it was started on, unless it names a commit itself.

    It may have more epochs than the run was started with; see `with_length`. Images and base model may have moved.

    Raises:
        ConfigError: Another setting that matters differs from those the run was started with; all are named with both
            values.
    """
    started = load_config(str(folder.config))
    config = with_length(config, started, folder)
    if not (config.base.revision and re.fullmatch(r"[0-9a-f]{40}", config.base.revision)):
        config = pinned(config, started.base.revision)
    if different := _differences(_settings(started), _settings(config)):
        raise ConfigError(f"The run in {folder.path} was started with other settings:\n{different}")
    return config


def _settings(config: RunConfig) -> dict[str, Any]:
    """The options that must be the same when a run resumes, as JSON values by dotted name."""
    free = (*FREE_WHEN_RESUMING, *_LENGTH, *_LOCATIONS)
    found = {name: value for name, value in options(config) if name not in free}
    found["data.sets"] = [
        {"name": one.title} | {key: value for key, value in entry.items() if key != "folder"}
        for one, entry in zip(config.data.raw_sets, found["data.sets"], strict=True)
    ]
    settings: dict[str, Any] = json.loads(json.dumps(found))
    return settings


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A line for every option with another value; an option that earlier versions did not have is none."""
    known = {RENAMED.get(name, name): value for name, value in before.items()}
    return "\n".join(
        f"  {name}: was {known[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in known and known[name] != value
    )


def keep_locations(config: RunConfig, folder: RunFolder) -> None:
    """Write down where images and base model of a run are, if they have moved since it was started."""
    before, now = (
        [one.data.folders, *(value for name, value in options(one) if name in _LOCATIONS)]
        for one in (load_config(str(folder.config)), config)
    )
    if before != now:
        folder.create(dump_toml(config))


def what_must_match(context: RunContext) -> dict[str, Any]:
    """What a checkpoint keeps of a run beside what is trained, and `check_same_content` compares."""
    base = context.base
    kept = {
        "pictures": image_identities(context),
        "base": context.loaded.identity,
        "vae": base.vae_identity,
        "text": base.text_identity,
        "scheduler": base.scheduler_settings,
        "settings": _settings(pinned(context.config, base.revision)),
        "versions": _versions(),
    }
    return kept | ({"lora_files": context.lora_hashes} if context.lora_hashes else {})


def _versions() -> dict[str, str]:
    return {
        "sdlora": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "Python": platform.python_version(),
    }


def other_versions(extra: dict[str, Any]) -> str | None:
    """A sentence on the programs that are of other versions than a checkpoint with `extra` was made with, or None."""
    changed = [
        f"{name} {before} (now {now})"
        for name, now in _versions().items()
        if (before := extra.get("versions", {}).get(name, now)) != now
    ]
    if not changed:
        return None
    return (
        f"The run was started with {', '.join(changed)}. Other versions may round differently, so that the result may "
        "differ in its last digits from that of a run without a break."
    )


def image_identities(context: RunContext) -> dict[str, str]:
    """A hash of pixels, mask, caption and networks of all images of a run, by name."""
    found: dict[str, str] = {}
    for term in context.trainer.terms:
        found |= term.loss.data.identities()
    if context.validation is not None:
        found |= {f"held out: {name}": identity for name, identity in context.validation.data.identities().items()}
    return found


def check_same_content(extra: dict[str, Any], context: RunContext) -> None:
    """Check that settings, base model and images, in a filled cache, are those that a checkpoint was made with.

    Args:
        extra: What the checkpoint holds beside what is trained; see `what_must_match`.

    Raises:
        SdloraError: They are not, the checkpoint is damaged, or the base model's own previews were never checked.
    """
    needed: dict[str, type] = {"pictures": dict, "metrics_bytes": int, "heldout_losses": dict}
    if lacking := [name for name, kind in needed.items() if not isinstance(extra.get(name), kind)]:
        raise OutputError(
            f"The newest checkpoint in {context.folder.checkpoints} is damaged (it has no {lacking[0]}). Delete its "
            "folder to resume from the one before it."
        )
    own = what_must_match(context)
    # A run older than the copy check is told to edit this one, which changes nothing that is trained.
    before = {name: value for name, value in extra.get("settings", {}).items() if name != "copycheck.enabled"}
    if different := _differences(before, own["settings"]):
        raise ConfigError(
            f"{context.folder.config} was changed after the run's newest checkpoint was saved:\n{different}\nSet back "
            "what it was to resume, or start a new run with the other settings."
        )
    hashes = extra.get("lora_files", {})
    if changed := [name for name, content in context.lora_hashes.items() if hashes.get(name) != content]:
        raise OutputError(
            f"The run was started with other LoRA files: the content of {', '.join(changed)} has changed since. Put "
            "the old one back, or start a new run."
        )
    _check_base(extra, own, context.config.base.path)
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


def _check_base(extra: dict[str, Any], own: dict[str, Any], path: str) -> None:
    """Compare the parts of a base model; earlier versions kept fewer of them, later ones may know more settings."""
    changed = [
        f"the {network} (hash {extra[key]}, now {own[key]})"
        for key, network in _NETWORKS.items()
        if extra.get(key) not in (None, own[key])
    ]
    before, now = extra.get("scheduler", {}), own["scheduler"]
    changed += [
        f"{key} of the noise schedule ({before[key]!r}, now {now[key]!r})"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    if changed:
        raise OutputError(
            f"The run was started with another base model: in {path!r}, {', '.join(changed)} has changed since. Put "
            "the old one back, or start a new run."
        )


def load_newest(
    checkpoints: Sequence[Path], trainer: Trainer, check: Callable[[dict[str, Any]], None] = lambda extra: None
) -> dict[str, Any] | None:
    """Restore a trainer from the main process's newest checkpoint, in every process alike.

    `checkpoints`, oldest first, are empty in the other processes, which are sent the checkpoint if any of them, on
    another machine, does not see the folder; `check` may refuse what the run had kept in it. Returns what it had kept;
    None if there is no checkpoint.
    """
    processes = trainer.processes
    newest = processes.agree(list(checkpoints[-1:]))
    if not newest:
        return None
    if not processes.any(not newest[0].is_dir()):
        return load_checkpoint(newest[0], trainer, check)
    files = {file.name: file.read_bytes() for file in newest[0].iterdir()} if processes.is_main else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in processes.agree(files).items():
            (Path(folder) / name).write_bytes(content)
        return load_checkpoint(Path(folder), trainer, check)
