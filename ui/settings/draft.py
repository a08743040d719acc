"""The recipe that is being written, and its starting points: what a first run asks of an artist.

It is kept on disk at every change, so that a reload or another tab finds it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlora.common.bundled import BUILTIN, resolve_data_folder
from sdlora.common.files import write_json
from sdlora.common.remote import is_url
from sdlora.config.schema import RunConfig
from sdlora.config.toml import RENAMED, load_config, options, renaming_note
from sdlora.errors import ConfigError
from sdlora.events import fields_from_json, saved_as, to_json
from sdlora.run.estimate import Estimate

from ..state.folders import Studio, safe_name
from ..state.locations import check_location, check_locations, to_path
from . import form
from .estimate import estimate

_OWN = {"name", "data.folder"}

SUBJECTS: dict[str, dict[str, Any]] = {
    "character": {"lora.rank": 16, "lora.alpha": 16.0},
    "style": {"lora.rank": 16, "lora.alpha": 16.0, "lora.targets": ["cross_attention", "self_attention"]},
    "object": {"lora.rank": 8, "lora.alpha": 8.0},
}
"""What is taught: options by kind of subject, on a base of ordinary size."""

LENGTHS: dict[str, tuple[int, int]] = {"a first look": (2, 12), "as usual": (4, 36), "thorough": (5, 50)}
"""How long to train: epochs, and repeats in each."""

FITTED: dict[str, Any] = {
    "train.precision": "auto", "train.gradient_accumulation_steps": 1, "train.gradient_checkpointing": False,
    "base.quantization": "none", "data.resolution_px": None,
}  # fmt: skip
"""What is changed where memory is short, beside the batch size, as it is where there is enough."""

_OF_POCKET = (
    "lora.rank", "lora.alpha", "lora.targets", "train.batch_size", "train.learning_rate", "train.lr_schedule",
    "preview.guidance",
)  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A recipe on its way."""

    # A set's name in the studio, a folder or "builtin:NAME"; empty until one is chosen, or if data.sets names several.
    images: str = field(default="", metadata=saved_as("pictures"))
    name: str = ""  # the run's; empty takes the set's
    subject: str = "character"  # a key of `SUBJECTS`
    length: str = "as usual"  # a key of `LENGTHS`
    fitted: list[str] = field(default_factory=list)  # in words: what was changed to fit into this machine's memory
    # Every option that is not at its default, by its dotted name, apart from name and folder.
    values: dict[str, Any] = field(default_factory=lambda: _changed(recipe("character", "as usual", "pocket")))

    @property
    def trigger(self) -> str:
        """The word for what is taught; empty until there is one."""
        return self.values.get("data.trigger") or ""

    @property
    def base(self) -> str:
        """base.path."""
        return str(self.value("base.path"))

    def value(self, name: str) -> Any:
        """An option's value."""
        return self.values.get(name, _defaults()[name])

    def with_values(self, values: dict[str, Any]) -> Draft:
        """The same with some options changed."""
        return replace(self, values=_changed(self.values | values))

    def with_answers(self, subject: str, length: str, base: str) -> Draft:
        """The same with the options that three answers stand for, changed to fit into this machine's memory."""
        changed = replace(self, subject=subject, length=length).with_values(recipe(subject, length, base))
        found = changed.needs()
        if found is None:
            return changed
        values = {name: value for change in found.changes for name, value in change.values.items()}
        return replace(changed.with_values(values), fitted=[str(change) for change in found.changes])

    def needs(self) -> Estimate | None:
        """What it needs as it stands; None if its base model is not on this machine.

        Raises:
            ConfigError: Anything is wrong with it.
        """
        without_images = {"data.folder": "none", "data.sets": []}
        return estimate(form.make_config(self.values | without_images, "plan"))

    @property
    def has_images(self) -> bool:
        """Whether images are chosen: one set, or several in data.sets."""
        return bool(self.images or self.value("data.sets"))

    def folder(self, studio: Studio) -> Path | None:
        """Where its images lie; None until they are chosen, or if they are in a store.

        Raises:
            ConfigError: That is no shipped set, or outside of what may be read.
        """
        if is_url(self.images):
            check_location(studio, self.images)
        if not self.images or is_url(self.images):
            return None
        if self.images.startswith(BUILTIN):
            return resolve_data_folder(self.images)
        if self.images == safe_name(self.images):
            return studio.image_set(self.images).resolve()
        return studio.allowed(to_path(self.images))

    def run_name(self) -> str:
        """The name that the run gets."""
        return self.name.strip() or safe_name(self.images.removeprefix(BUILTIN), "lora")

    def config(self, studio: Studio) -> RunConfig:
        """The whole configuration.

        Raises:
            ConfigError: There are no images yet, or anything is wrong; all faults are named at once.
        """
        if not self.has_images:
            raise ConfigError("There are no images yet. Add some under Images.")
        folder = self.folder(studio)
        where = self.images if folder is None or self.images.startswith(BUILTIN) else str(folder.absolute())
        values = self.values | {"data.folder": where, "name": self.run_name()}
        check_locations(studio, form.to_document(values))
        return form.make_config(values, self.run_name())


def recipe(subject: str, length: str, base: str) -> dict[str, Any]:
    """The options that a subject, a length and a base.path stand for; all others stay as they are."""
    epochs, repeats = LENGTHS[length]
    # The built-in base is small: what suits larger ones teaches it nothing.
    defaults = dict(options(load_config("quickstart"))) if base == "pocket" else _defaults()
    values = {name: defaults[name] for name in _OF_POCKET} | ({} if base == "pocket" else SUBJECTS[subject])
    return values | FITTED | {"base.path": base, "train.epochs": epochs, "data.repeats": repeats}


def _defaults() -> dict[str, Any]:
    return dict(options(RunConfig()))


def _changed(values: dict[str, Any]) -> dict[str, Any]:
    defaults = _defaults()
    return {name: value for name, value in values.items() if name not in _OWN and value != defaults[name]}


def from_config(config: RunConfig, studio: Studio) -> Draft:
    """A configuration, from a file or from another run, as a draft."""
    values = dict(options(config))
    images = values["data.folder"]
    if images and not images.startswith(BUILTIN) and Path(images).resolve().parent == studio.sets.resolve():
        images = Path(images).name
    return Draft(images=images, name=config.name or "", values=_changed(values))


def read_draft(studio: Studio) -> Draft:
    """The draft as it was left, or a fresh one."""
    if not studio.draft.is_file():
        return Draft()
    found = Draft(**fields_from_json(Draft, json.loads(studio.draft.read_text(encoding="utf-8"))))
    found = replace(found, values={RENAMED.get(name, name): value for name, value in found.values.items()})
    known = found.subject in SUBJECTS and found.length in LENGTHS and found.values.keys() <= _defaults().keys()
    return found if known else Draft(images=found.images, name=found.name)


def update_draft(studio: Studio) -> list[str]:
    """Write the draft again if it holds earlier names of options; returns a warning about each."""
    if not studio.draft.is_file():
        return []
    values = json.loads(studio.draft.read_text(encoding="utf-8")).get("values", {})
    notes = [renaming_note(name) for name in values if name in RENAMED]
    if notes:
        write_draft(studio, read_draft(studio))
    return notes


def write_draft(studio: Studio, draft: Draft) -> None:
    """Keep a draft."""
    write_json(studio.draft, to_json(draft))
