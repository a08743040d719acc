"""Recipes: the shipped presets as a first run asks for them, by what is taught, for how long and on which base model.

Pure but for a look at the base model's header. What an answer sets is what `sdlora train PRESET` would train with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from sdlora.common.bundled import BUILTIN_BASES, shipped_configs
from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config, options

from .bases import preset_family

SUBJECTS = ("character", "style", "object")
"""What is taught; the presets of a family are named after them."""

LENGTHS: dict[str, tuple[int | None, float]] = {"a first look": (2, 0.4), "as usual": (None, 1.0), "thorough": (5, 1.5)}
"""How long to train: epochs, the preset's own if None, and exposures of an image in relation to the preset's."""

OWN = "own settings"
"""In place of a subject or a length whose settings were changed, loaded or cloned."""

FITTED: dict[str, Any] = {
    "train.precision": "auto", "train.gradient_accumulation_steps": 1, "train.gradient_checkpointing": False,
    "base.quantization": "none", "data.resolution_px": None,
}  # fmt: skip
"""What is changed where memory is short, beside the batch size, as it is where there is enough."""

OF_SET = (
    "data.trigger", "data.sets", "data.recursive", "data.exclude", "data.caption", "data.caption_prefix",
    "data.caption_suffix", "data.allow_trigger_only", "data.protected_tags", "data.masks", "loss.mask_floor",
    "data.validation_folder", "data.class_words", "data.preservation_folder", "data.preservation_caption",
    "train.preservation_weight", "train.preservation_every", "preview.prompts",
)  # fmt: skip
"""Options that are about the images, and go with them."""

_OF_LENGTH = ("train.epochs", "train.exposures", "data.repeats")
_QUICKSTARTS = {"pocket": "quickstart"}
_OF_POCKET = (
    "lora.rank", "lora.alpha", "lora.targets", "train.batch_size", "train.learning_rate", "train.lr_schedule",
    "preview.guidance",
)  # fmt: skip
_POCKET_LENGTHS = {"a first look": (2, 12), "as usual": (4, 36), "thorough": (5, 50)}  # epochs, and repeats in each
# Where there is no preset. The schema's own default is one exposure an epoch, which teaches nothing.
_USUAL_EXPOSURES = 100


def defaults() -> dict[str, Any]:
    """Every option at the schema's default."""
    return dict(_schema_defaults())


@functools.cache
def _schema_defaults() -> Mapping[str, Any]:
    return dict(options(RunConfig()))


def preset_name(subject: str, base: str) -> str | None:
    """The preset that a recipe is; None if there is none for the base model's family, or for own settings."""
    if subject not in SUBJECTS:
        return None
    if base in BUILTIN_BASES:
        return _QUICKSTARTS[base]
    family = preset_family(base)
    return None if family is None else f"{family}-{subject}"


def recipe(subject: str, length: str, base: str) -> dict[str, Any]:
    """The options that a subject, a length and a base.path stand for; all others stay as they are.

    A length that is `OWN` leaves the options of lengths out.
    """
    values = preset_options(preset_name(subject, base))
    return {**values, "base.path": base, **({} if length == OWN else length_options(subject, length, base))}


def preset_options(preset: str | None) -> dict[str, Any]:
    """Every option that recipes set, apart from their length and the base, by a preset or the schema's defaults."""
    found = _resolved(preset)
    return {name: found[name] for name in _recipe_options() if name not in _OF_LENGTH}


def length_options(subject: str, length: str, base: str) -> dict[str, Any]:
    """The options that a length stands for."""
    if base in BUILTIN_BASES:
        epochs, repeats = _POCKET_LENGTHS[length]
        return {"train.epochs": epochs, "train.exposures": None, "data.repeats": repeats}
    usual = _resolved(preset_name(subject, base))
    epochs_of_length, share = LENGTHS[length]
    epochs = epochs_of_length or usual["train.epochs"]
    exposures = usual["train.exposures"] or _USUAL_EXPOSURES
    return {"train.epochs": epochs, **follow_exposures({"train.exposures": round(share * exposures)}, epochs)}


def follow_exposures(values: Mapping[str, Any], epochs: Any) -> dict[str, Any]:
    """Options whose data.repeats follow from train.exposures, as the schema spreads them."""
    exposures = values.get("train.exposures")
    if not isinstance(exposures, int) or not isinstance(epochs, int) or exposures < 1 or epochs < 1:
        return dict(values)
    return {**values, "data.repeats": max(1, round(exposures / epochs))}


@functools.cache
def _resolved(preset: str | None) -> Mapping[str, Any]:
    found = defaults()
    if preset is not None and preset in _QUICKSTARTS.values():
        # The built-in bases are small: what suits larger ones teaches them nothing.
        pocket = dict(options(load_config(preset)))
        return found | {name: pocket[name] for name in _OF_POCKET}
    return found if preset is None else dict(options(load_config(preset, ["data.folder=none"])))


@functools.cache
def _recipe_options() -> tuple[str, ...]:
    """Options that any recipe sets, in the schema's order."""
    plain = defaults()
    shipped = [name for name in shipped_configs() if name.rpartition("-")[2] in SUBJECTS]
    presets = [_resolved(name) for name in (*_QUICKSTARTS.values(), *shipped)]
    apart = {"name", "data.folder", "data.sets"}
    return tuple(
        name
        for name, value in plain.items()
        if name not in apart and (name in FITTED or any(preset[name] != value for preset in presets))
    )
