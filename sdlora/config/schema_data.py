"""The schema's largest section: which images are trained, and with which words.

A part of `config`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sdlora.common.remote import check_url, is_url
from sdlora.errors import ConfigError


class Section(BaseModel):
    """What all sections are: closed to unknown keys, and not changed once they are made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class SetConfig(Section):
    """One of several folders; what it does not say is taken from `data`."""

    folder: str = Field(min_length=1, description="As data.folder.")
    name: str | None = Field(
        None, pattern=r"^[\w][\w. -]{0,99}$", description="What its images' names begin with; the folder's if unset."
    )
    repeats: int | None = Field(None, ge=1, le=1000, description="As data.repeats.")
    trigger: str | None = Field(None, description="As data.trigger.")
    caption: str | None = Field(None, description="As data.caption.")

    @property
    def title(self) -> str:
        """Its name, or the last part of its folder."""
        return self.name or re.split(r"[/\\:]", self.folder.rstrip("/\\"))[-1]


class DataConfig(Section):
    """Which images are trained, and with which words."""

    folder: str = Field(
        "",
        description="Folder of images with captions, seen from where you are; 'builtin:NAME' is a shipped set, and a "
        "URL such as 's3://BUCKET/FOLDER' is fetched.",
    )
    sets: list[SetConfig] = Field(
        [],
        description="Several folders in one run, instead of data.folder: a table each with folder and, where it "
        "differs from data, repeats, trigger, caption and a name.",
    )
    validation_folder: str | None = Field(
        None, description="Folder of images that are never trained on; the validation loss is measured on them."
    )
    validation_split: bool = Field(
        True,
        description="Without data.validation_folder, keep 2 to 4 of 20 or more images out of training for that loss.",
    )
    caption: str | None = Field(None, description="One caption for every image that has none of its own.")
    trigger: str | None = Field(None, description="A word put in front of every caption that does not contain it.")
    class_words: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="What there is beside the trigger's subject ('cat', 'red house'): the base's own answers to these "
        "words are preserved, without further images (train.preservation_weight).",
    )
    preservation_folder: str | None = Field(
        None,
        description="Instead of class words, a folder of images and captions of what is preserved (regularisation "
        "images); they are trained beside the set (train.preservation_weight).",
    )
    preservation_caption: str | None = Field(
        None, description="One caption, such as 'a cat', for all images of data.preservation_folder without one."
    )
    allow_trigger_only: bool = Field(False, description="Images without a caption get the trigger alone.")
    repeats: int = Field(1, ge=1, le=1000, description="How often every image is seen in an epoch.")
    resolution_px: int | None = Field(
        None, ge=16, le=4096, description="Training size, as the edge of a square; the base's own size if unset."
    )
    buckets: bool = Field(True, description="Keep the shape of wide and tall images; otherwise crop to squares.")
    bucket_step_px: int = Field(64, ge=8, le=512, description="Widths and heights of buckets are multiples of this.")
    background: str = Field("white", description="The colour laid under transparent pixels, by name or as #rrggbb.")
    masks: Literal["none", "alpha", "file"] = Field(
        "none",
        description="What of an image is trained: all of it, what is not transparent ('alpha'), or what is white in "
        "NAME-mask.png beside it ('file').",
    )
    shuffle_tags: bool = Field(False, description="Shuffle the comma-separated parts of captions at every exposure.")
    keep_tags: int = Field(1, ge=0, le=100, description="How many parts stay in front when tags are shuffled.")
    max_token_windows: int = Field(
        1, ge=1, le=8, description="How many windows of 75 tokens are read of a caption; what is longer is cut off."
    )
    caption_dropout: float = Field(
        0.0, ge=0.0, le=1.0, description="Share of exposures without any caption, which keeps guidance working."
    )

    def all_sets(self) -> list[SetConfig]:
        """The folders that are trained, one or more, each with everything that is said of it."""
        common = {"repeats": self.repeats, "trigger": self.trigger, "caption": self.caption}
        if not self.sets:
            return [SetConfig.model_validate({"folder": self.folder, **common})]
        own = ({key: value for key, value in one.model_dump().items() if value is not None} for one in self.sets)
        return [SetConfig.model_validate({**common, **settings}) for settings in own]

    def all_triggers(self) -> str | None:
        """Every trigger, with commas between them; None if there is none."""
        return ", ".join(dict.fromkeys(one.trigger for one in self.all_sets() if one.trigger)) or None

    @model_validator(mode="after")
    def _sets_have_names(self) -> DataConfig:
        if self.sets and self.folder:
            raise ValueError("data.folder and data.sets are two ways to say it; name every folder in data.sets")
        names = [one.title for one in self.sets]
        twice = sorted({name or "''" for name in names if names.count(name) > 1 or name in ("", ".", "..")})
        if twice:
            raise ValueError(f"data.sets: give a name of its own to each set called {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _urls_hold_no_secrets(self) -> DataConfig:
        for folder in (
            self.folder,
            *(one.folder for one in self.sets),
            self.validation_folder,
            self.preservation_folder,
        ):
            if folder and is_url(folder):
                try:
                    check_url(folder)
                except ConfigError as error:
                    raise ValueError(str(error).removesuffix(".")) from error
        return self

    @field_validator("background")
    @classmethod
    def _known_color(cls, value: str) -> str:
        ImageColor.getrgb(value)
        return value
