"""The recipe that is being written, and its starting points: what a first run asks of an artist.

It is kept on disk at every change, so that a reload or another tab finds it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlora.common.bundled import BUILTIN, BUILTIN_BASES
from sdlora.common.files import write_json
from sdlora.common.remote import is_url
from sdlora.config.schema import RunConfig
from sdlora.config.toml import RENAMED, options, renaming_note
from sdlora.errors import ConfigError
from sdlora.events import fields_from_json, saved_as, to_json
from sdlora.models.families import FAMILIES, suits
from sdlora.run.estimate import Estimate

from ..state.folder_notes import change_notes, read_notes
from ..state.folders import Studio, safe_name
from ..state.locations import check_location, check_locations, images_folder, to_path
from . import form
from .bases import POCKET, check_base, family_of
from .estimate import estimate
from .recipes import (
    FITTED,
    LENGTHS,
    OF_SET,
    OWN,
    SUBJECTS,
    defaults,
    follow_exposures,
    length_options,
    preset_name,
    preset_options,
    recipe,
)

_PROMPTS = "preview.prompts"  # of a preset until the artist writes some


@dataclass(frozen=True)
class Change:
    """An option that is not at its default."""

    name: str
    value: Any
    by: str  # a preset, a length or a reason; empty if the artist set it


@dataclass(frozen=True)
class Draft:
    """A recipe on its way."""

    # A set's name in the studio, a folder or "builtin:NAME"; empty until one is chosen, or if data.sets names several.
    images: str = field(default="", metadata=saved_as("pictures"))
    name: str = ""  # the run's; empty takes the set's
    subject: str = "character"  # one of `SUBJECTS`, or `OWN`
    fitted: list[str] = field(default_factory=list)  # in words: what was changed to fit into this machine's memory
    # Every option that is not at its default, by its dotted name, apart from name and folder.
    values: dict[str, Any] = field(default_factory=lambda: _changed(recipe("character", "as usual", POCKET)))
    # What belongs to other sets of images, by set: the options of `OF_SET` that are not at their defaults.
    of_sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def trigger(self) -> str:
        """The word for what is taught; empty until there is one."""
        return self.values.get("data.trigger") or ""

    @property
    def base(self) -> str:
        """base.path."""
        return str(self.value("base.path"))

    @property
    def length(self) -> str:
        """The key of `LENGTHS` whose options it has, or `OWN`."""
        subject = self.subject if self.subject in SUBJECTS else SUBJECTS[0]
        found = (name for name in LENGTHS if self._has(length_options(subject, name, self.base)))
        return next(found, OWN)

    @property
    def preset(self) -> str | None:
        """The shipped configuration that its recipe was taken from; None if there is none."""
        return preset_name(self.subject, self.base)

    def value(self, name: str) -> Any:
        """An option's value; repeats follow from exposures, if those are set."""
        found = defaults() | self.values
        if name == "data.repeats" and not found["data.sets"]:
            return follow_exposures(found, found["train.epochs"])[name]
        return found[name]

    def with_values(self, values: dict[str, Any]) -> Draft:
        """The same with some options changed."""
        return replace(self, values=_changed(self.values | values))

    def with_value(self, name: str, value: Any) -> Draft:
        """The same with one option changed; repeats that are set take the place of exposures."""
        if name == "data.repeats" and value != self.value(name):
            return self.with_values({name: value, "train.exposures": None})
        return self.with_values({name: value})

    def with_answers(self, subject: str, length: str, base: str) -> Draft:
        """The same with the options that three answers stand for, changed to fit into this machine's memory.

        `OWN` in place of a subject or a length keeps the options that those stand for.
        """
        if subject == OWN:
            kept = (
                {"base.path": base}
                if length == OWN
                else {"base.path": base, **length_options(SUBJECTS[0], length, base)}
            )
            return replace(self, subject=subject, fitted=[]).with_values(kept)
        values = recipe(subject, length, base)
        if self.value(_PROMPTS) != preset_options(self.preset)[_PROMPTS]:
            values.pop(_PROMPTS)
        changed = replace(self, subject=subject, fitted=[]).with_values(values)
        found = changed.needs()
        if found is None:
            return changed
        values = {name: value for change in found.changes for name, value in change.values.items()}
        return replace(changed.with_values(values), fitted=[str(change) for change in found.changes])

    def with_length(self, length: str) -> Draft:
        """The same with the options that a length stands for."""
        subject = self.subject if self.subject in SUBJECTS else SUBJECTS[0]
        return self if length == OWN else self.with_values(length_options(subject, length, self.base))

    def with_images(self, images: str) -> Draft:
        """The same with another set of images and what belongs to it, in place of what belongs to this one."""
        if images == self.images:
            return self
        if not self.has_images:
            return replace(self, images=images)
        plain = {name: defaults()[name] for name in OF_SET} | {_PROMPTS: preset_options(self.preset)[_PROMPTS]}
        left = {name: value for name, value in self.values.items() if name in OF_SET and value != plain[name]}
        others = {name: values for name, values in {**self.of_sets, self.images: left}.items() if name and values}
        changed = self.with_values(plain | others.pop(images, {}))
        return replace(changed, images=images, name="", of_sets=others)

    def changes(self) -> list[Change]:
        """Every option that is not at its default, apart from the trigger and the base model, and what has set it."""
        from_preset, from_length = preset_options(self.preset), {}
        length = self.length
        if self.subject in SUBJECTS and length != OWN:
            from_length = length_options(self.subject, length, self.base)
        found = []
        for name, value in self.values.items():
            if name in ("data.trigger", "base.path", "base.family"):
                continue
            if any(f"{name} = " in words for words in self.fitted):
                by = "to fit into memory"
            elif from_preset.get(name) == value and self.preset is not None:
                by = self.preset
            elif from_length.get(name) == value:
                by = length
            else:
                by = ""
            found.append(Change(name, value, by))
        return found

    def _check_family(self) -> None:
        """Refuse settings that are made for the family of another base model."""
        made_for = self.value("base.family")
        found = self.base if self.base in BUILTIN_BASES else family_of(self.base)
        if found is None or suits(made_for, found):
            return
        titles = {name: f"the built-in {name}" for name in BUILTIN_BASES} | {
            name: family.title for name, family in FAMILIES.items()
        }
        raise ConfigError(
            f"These settings are made for {titles[made_for]}, but the base model is {titles[found]}. Choose what it "
            "should learn, which takes the settings of this base model."
        )

    def is_recipe(self, subject: str) -> bool:
        """Whether it has a subject's options, apart from length and prompts and from what memory may have changed."""
        values = preset_options(preset_name(subject, self.base))
        return self._has(
            {name: value for name, value in values.items() if name not in {*FITTED, _PROMPTS, "base.family"}}
        )

    def _has(self, values: dict[str, Any]) -> bool:
        return all(self.value(name) == value for name, value in values.items())

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
            SdloraError: It is not the name of a set, or there is no such folder, or it may not be read.
        """
        if is_url(self.images):
            check_location(studio, self.images)
        return images_folder(studio, self.images) if self.images and not is_url(self.images) else None

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
        check_base(studio, self.base)
        folder = self.folder(studio)
        where = self.images if folder is None or self.images.startswith(BUILTIN) else str(folder.absolute())
        values = self.values | {"data.folder": where, "name": self.run_name()}
        if folder is not None:
            values["data.exclude"] = list(read_notes(studio, folder).taken_out)
        check_locations(studio, form.to_document(values))
        config = form.make_config(values, self.run_name())
        self._check_family()
        return config


def _changed(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not at their defaults; repeats that follow from exposures are left out."""
    plain = defaults()
    apart = {"name", "data.folder"}
    if values.get("train.exposures") is not None and not values.get("data.sets"):
        apart.add("data.repeats")
    return {name: value for name, value in values.items() if name not in apart and value != plain[name]}


def from_config(config: RunConfig, studio: Studio) -> Draft:
    """A configuration, from a file or from another run, as a draft."""
    values = dict(options(config))
    images = values["data.folder"]
    if images and not images.startswith(BUILTIN) and Path(images).resolve().parent == studio.sets.resolve():
        images = Path(images).name
    elif images and not images.startswith(BUILTIN) and not is_url(images):
        images = str(to_path(images).absolute())
    if (left_out := values.pop("data.exclude")) and images and not is_url(images):
        # What a set leaves out is noted for its folder.
        change_notes(studio, images_folder(studio, images), taken_out=tuple(left_out))
    elif left_out:
        values["data.exclude"] = left_out
    draft = Draft(images=images, name=config.name or "", values=_changed(values))
    return replace(draft, subject=next((one for one in SUBJECTS if draft.is_recipe(one)), OWN))


def read_draft(studio: Studio) -> Draft:
    """The draft as it was left, or a fresh one."""
    if not studio.draft.is_file():
        return Draft()
    found = Draft(**fields_from_json(Draft, json.loads(studio.draft.read_text(encoding="utf-8"))))
    found = replace(found, values={RENAMED.get(name, name): value for name, value in found.values.items()})
    known = found.subject in (*SUBJECTS, OWN) and found.values.keys() <= defaults().keys()
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
