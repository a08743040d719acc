"""The data section of the schema: which images a run trains on, and with which captions.

Part of `schema`; every room below reads the resolved `DataConfig.sets`, never the options it is made from.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Annotated, Any, Final, Literal

from PIL import ImageColor
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from sdlora.common.bundled import BucketOptions, CaptionOptions, ImageFolder
from sdlora.common.remote import check_url, is_url
from sdlora.errors import ConfigError

LOCATION: Final = "location"
"""Marks an option whose value names a file, a folder or a URL, so that what others ask for can be held to what they may
read; see `sdlora.config.toml.locations`."""


class Section(BaseModel):
    """The base of all sections: unknown keys are refused, values never change, and docstrings describe the options."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True, use_attribute_docstrings=True,
        defer_build=True,
    )  # fmt: skip

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Join the lines of the options' descriptions."""
        super().__pydantic_init_subclass__(**kwargs)
        for option in cls.model_fields.values():
            option.description = option.description and " ".join(option.description.split())


ResolutionPx = Annotated[int, Field(ge=16, le=4096)]


class SetOptions(Section):
    """One entry of data.sets; options left out are taken from `data`."""

    folder: Annotated[str, LOCATION] = Field(min_length=1)
    """Like data.folder."""
    name: str | None = Field(None, pattern=r"^[\w][\w. -]{0,99}$")
    """Prefix of its images' names; the last part of the folder if unset."""
    repeats: int | None = Field(None, ge=1, le=1000)
    """Like data.repeats."""
    loss_weight: float | None = Field(None, gt=0.0, le=100.0)
    """Factor of the loss of its images, relative to 1; unlike repeats, it costs no steps."""
    trigger: str | None = None
    """Like data.trigger."""
    caption: str | None = None
    """Like data.caption."""
    recursive: bool | None = None
    """Like data.recursive."""
    exclude: list[Annotated[str, Field(min_length=1)]] | None = None
    """Like data.exclude."""
    resolutions_px: list[ResolutionPx] | None = Field(None, min_length=1)
    """Like data.resolutions_px; one for a resolution of its own."""
    max_aspect: float | None = Field(None, ge=1.0, le=8.0)
    """Like data.max_aspect."""
    no_upscale: bool | None = None
    """Like data.no_upscale."""
    flip: bool | None = None
    """Like data.flip."""
    caption_prefix: str | None = None
    """Like data.caption_prefix."""
    caption_suffix: str | None = None
    """Like data.caption_suffix."""
    caption_lines: bool | None = None
    """Like data.caption_lines."""
    wildcards: bool | None = None
    """Like data.wildcards."""
    shuffle_tags: bool | None = None
    """Like data.shuffle_tags."""
    keep_tags: int | None = Field(None, ge=0, le=100)
    """Like data.keep_tags."""
    tag_dropout: float | None = Field(None, ge=0.0, le=1.0)
    """Like data.tag_dropout."""

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    @property
    def title(self) -> str:
        """The set's name, or the last part of its folder."""
        return self.name or re.split(r"[/\\:]", self.folder.rstrip("/\\"))[-1]


class DataConfig(Section):
    """Which images are trained on, and with which captions."""

    raw_folder: Annotated[str, LOCATION] = Field("", alias="folder")
    """Folder of images with captions, relative to the working directory; 'builtin:NAME' is a bundled set, and a URL
    such as 's3://BUCKET/FOLDER' is downloaded."""
    raw_sets: list[SetOptions] = Field([], alias="sets")
    """Several folders in one run, instead of data.folder: one table per set with its folder and, where they differ from
    [data], its repeats, trigger, caption and name."""
    recursive: bool = False
    """Read the images of all subfolders, too, with their captions beside them; hidden folders and 'holdout' are left
    out."""
    exclude: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Images that are left out of training, by their path in the folder ('blurry.png'); their files stay where they
    are."""
    validation_folder: Annotated[str | None, LOCATION] = None
    """Folder of images that are never trained on; the validation loss is measured on them."""
    validation_split: bool = True
    """Without data.validation_folder, and with 20 images or more, keep 2 to 4 of them out of training to measure the
    validation loss."""
    raw_caption: str | None = Field(None, alias="caption")
    """Caption of every image that has none of its own."""
    raw_trigger: str | None = Field(None, alias="trigger")
    """Trigger word, put in front of every caption that does not contain it."""
    class_words: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Words for the kind of thing the trigger stands for ('cat', 'red house'). The base model's own predictions for
    them are preserved, without further images; see train.preservation_weight."""
    preservation_folder: Annotated[str | None, LOCATION] = None
    """Folder of images and captions to preserve (regularisation images), instead of class words. They are trained
    alongside the training images; see train.preservation_weight."""
    preservation_caption: str | None = None
    """Caption of images in data.preservation_folder that have none, such as 'a cat'."""
    allow_trigger_only: bool = False
    """Train images without a caption on the trigger word alone, instead of refusing them."""
    raw_repeats: int = Field(1, alias="repeats", ge=1, le=1000)
    """Exposures of each image per epoch."""
    resolution_px: int | None = Field(None, ge=16, le=4096)
    """Training resolution: the edge of a square; the base model's own if unset."""
    resolutions_px: list[ResolutionPx] = Field([])
    """Several training resolutions in one run, such as [512, 768, 1024], which the exposures of each image have in
    turn; data.resolution_px is then the largest."""
    buckets: bool = True
    """Keep the aspect ratio of wide and tall images (bucketing); false crops all to squares."""
    bucket_step_px: int = Field(64, ge=8, le=512)
    """Widths and heights of buckets are multiples of this."""
    max_aspect: float = Field(2.0, ge=1.0, le=8.0)
    """Longest edge of a bucket divided by its shortest, at most; images beyond it are cropped."""
    no_upscale: bool = False
    """Train images that are smaller than their bucket at the largest size that they fill, instead of enlarging them."""
    flip: bool = False
    """Mirror every image, with its mask, at every second exposure. Not for subjects with writing, or whose left and
    right differ."""
    background: str = "white"
    """Colour that transparent pixels are blended onto, by name or as #rrggbb."""
    masks: Literal["none", "alpha", "file"] = "none"
    """Which part of each image is trained: all of it ('none'), the opaque part ('alpha'), or the white part of
    NAME-mask.png beside it ('file')."""
    caption_prefix: str = ""
    """Text in front of every caption, followed by a space; never shuffled or dropped."""
    caption_suffix: str = ""
    """Text at the end of every caption, after a space unless it starts with punctuation; never shuffled or dropped."""
    caption_lines: bool = False
    """Every line of a caption file is a caption of its own; each exposure uses one, all of them equally often."""
    wildcards: bool = False
    """Replace {a|b} in captions by 'a' or 'b', drawn at every exposure."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of captions at every exposure."""
    keep_tags: int = Field(1, ge=0, le=100)
    """Number of tags that stay in front when tags are shuffled or dropped."""
    keep_separator: str = ""
    """Tags before this separator, such as '|||', stay in front instead of data.keep_tags; tags after a second one stay
    at the end. The separator is removed."""
    tag_dropout: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the comma-separated tags that is dropped at every exposure, except kept tags, the trigger and
    data.protected_tags."""
    protected_tags: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Tags that are never dropped."""
    max_token_windows: int = Field(1, ge=1, le=8)
    """Windows of 75 tokens that are read of each caption; the rest is cut off."""
    caption_dropout: float = Field(0.0, ge=0.0, le=1.0)
    """Share of exposures with an empty caption, so that classifier-free guidance keeps working."""

    @property
    def sets(self) -> list[ImageFolder]:
        """The folders that are trained on, one or more, each with everything that applies to it resolved."""
        common: dict[str, Any] = {
            "repeats": self.raw_repeats,
            "trigger": self.raw_trigger,
            "caption": self.raw_caption,
            "recursive": self.recursive,
            "exclude": tuple(self.exclude),
            "captions": self.captions,
            "flip": self.flip,
            "sizes": None,
        }
        if not self.raw_sets:
            return [ImageFolder(self.raw_folder, **common)]
        varied = {field.name for field in fields(CaptionOptions)}
        taken = {field.name for field in fields(ImageFolder)} - {"exclude"}
        return [
            ImageFolder(
                **common
                | {key: value for key, value in one if value is not None and key in taken}
                | ({} if one.exclude is None else {"exclude": tuple(one.exclude)})
                | {"sizes": self._sizes(one)}
                | {"name": one.title}
                | {"captions": replace(self.captions, **{key: v for key, v in one if v is not None and key in varied})}
            )
            for one in self.raw_sets
        ]

    @property
    def bucket_options(self) -> BucketOptions:
        """Which sizes images are trained at, where a set does not say otherwise."""
        several = tuple(self.resolutions_px)
        return BucketOptions(self.bucket_step_px, self.buckets, self.max_aspect, self.no_upscale, several)

    def resolutions(self, base_px: int) -> list[int]:
        """Every training resolution of the sets, from the smallest to the largest; `base_px` is the base model's."""
        top = tuple(self.resolutions_px) or (self.resolution_px or base_px,)
        each = [top if one.sizes is None else one.sizes.resolutions_px or top for one in self.sets]
        return sorted(set().union(*each))

    def _sizes(self, one: SetOptions) -> BucketOptions | None:
        """The sizes of a set, None if they are those of all."""
        own: dict[str, Any] = {"max_aspect": one.max_aspect, "no_upscale": one.no_upscale}
        own |= {"resolutions_px": one.resolutions_px and tuple(one.resolutions_px)}
        changed: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        return replace(self.bucket_options, **changed) if changed else None

    @property
    def captions(self) -> CaptionOptions:
        """How captions vary, where a set does not say otherwise."""
        values = {field.name: getattr(self, field.name) for field in fields(CaptionOptions)}
        return CaptionOptions(**values | {"protected_tags": tuple(self.protected_tags)})

    @property
    def validation_set(self) -> ImageFolder | None:
        """The folder of validation images, with the trigger and caption that [data] gives; None if it is unset."""
        folder = self.validation_folder
        if not folder:
            return None
        return ImageFolder(
            folder,
            trigger=self.raw_trigger,
            caption=self.raw_caption,
            captions=self.captions,
            recursive=self.recursive,
        )

    @property
    def prior_set(self) -> ImageFolder | None:
        """The folder of images to preserve, with their caption; None if it is unset."""
        folder = self.preservation_folder
        if not folder:
            return None
        captions = replace(self.captions, caption_prefix="", caption_suffix="")
        return ImageFolder(folder, caption=self.preservation_caption, captions=captions, recursive=self.recursive)

    @property
    def folders(self) -> list[str]:
        """Every folder the run reads: training sets first, then validation and preservation."""
        training = [one.folder for one in self.sets]
        return [folder for folder in (*training, self.validation_folder, self.preservation_folder) if folder]

    @property
    def triggers(self) -> list[str]:
        """Every trigger word once, in the order of the sets."""
        return list(dict.fromkeys(one.trigger for one in self.sets if one.trigger))

    @property
    def repeats_range(self) -> tuple[int, int]:
        """Fewest and most exposures of an image per epoch, over all sets."""
        repeats = [one.repeats for one in self.sets]
        return min(repeats), max(repeats)

    @model_validator(mode="after")
    def _check_resolutions(self) -> DataConfig:
        if self.resolutions_px and self.resolution_px not in (None, largest := max(self.resolutions_px)):
            raise ValueError(
                f"data.resolution_px ({self.resolution_px}) must be the largest of data.resolutions_px, or unset; set "
                f"it to {largest}"
            )
        for name, given in (("data", self.resolutions_px), *((one.title, one.resolutions_px) for one in self.raw_sets)):
            if given and len(set(given)) < len(given):
                raise ValueError(f"resolutions_px of {name}: every resolution may be listed only once")
        return self

    @model_validator(mode="after")
    def _check_folders(self) -> DataConfig:
        if self.raw_sets and self.raw_folder:
            raise ValueError("data.folder and data.sets exclude each other; list every folder in data.sets")
        names = [one.title for one in self.raw_sets]
        duplicates = sorted({name or "''" for name in names if names.count(name) > 1 or name in ("", ".", "..")})
        if duplicates:
            raise ValueError(
                f"data.sets: set names must be unique and not empty, found {', '.join(duplicates)}; give each of those "
                "sets a different name"
            )
        for folder in filter(is_url, self.folders):
            try:
                check_url(folder)
            except ConfigError as error:
                raise ValueError(str(error).removesuffix(".")) from error
        return self

    @field_validator("background")
    @classmethod
    def _check_color(cls, value: str) -> str:
        ImageColor.getrgb(value)
        return value
