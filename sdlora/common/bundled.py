"""The files shipped with sdlora, in a checkout and in an installed package alike, and folders of images anywhere.

Used wherever a folder of images, a shipped configuration or the built-in base model is named.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from sdlora.common.remote import download_set, is_url
from sdlora.errors import ConfigError

BUILTIN = "builtin:"
IMAGE_SUFFIXES = frozenset(
    {
        ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".heic", ".heif",
        ".jxl",
    }
)  # fmt: skip
"""Suffixes of the images in a folder, in lower case; some formats need a plugin."""
BUILTIN_BASES = {"pocket": "weights"}
"""The folders of the built-in base models by their names."""
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class CaptionOptions:
    """How captions become the texts that are trained; the options of the same names in the data section."""

    caption_lines: bool = False
    wildcards: bool = False
    caption_prefix: str = ""
    caption_suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 1
    keep_separator: str = ""
    tag_dropout: float = 0.0
    protected_tags: tuple[str, ...] = ()
    caption_dropout: float = 0.0


AS_WRITTEN = CaptionOptions()


@dataclass(frozen=True)
class BucketOptions:
    """Which sizes images are trained at, apart from their area.

    Attributes:
        step_px: Widths and heights are multiples of this, except those of the square itself.
        buckets: False crops all images to squares.
        max_aspect: Longest edge divided by the shortest, at least 1.
        no_upscale: Whether images that are smaller than their bucket get the largest that they fill.
        resolutions_px: Edges of the squares whose areas they have, in turn; one that is given elsewhere if empty.
    """

    step_px: int = 64
    buckets: bool = True
    max_aspect: float = 2.0
    no_upscale: bool = False
    resolutions_px: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, and what applies to all of them.

    Attributes:
        folder: Path, 'builtin:NAME' or URL.
        name: Prefix of the images' names, followed by a slash; None for no prefix.
        caption: Caption of images that have none of their own.
        repeats: Exposures of each image per epoch, at least 1.
        captions: How captions are made of those that are written.
        flip: Whether its images are mirrored at every second exposure.
        recursive: Whether the images of its subfolders are read, too; they are skipped with a notice otherwise.
        exclude: Paths, relative to the folder, of images that are left out.
        sizes: Which sizes its images are trained at, where that differs from other folders.
        loss_weight: Factor of its images' loss, above 0.
    """

    folder: str
    name: str | None = None
    caption: str | None = None
    trigger: str | None = None
    repeats: int = 1
    captions: CaptionOptions = AS_WRITTEN
    recursive: bool = False
    flip: bool = False
    exclude: tuple[str, ...] = ()
    sizes: BucketOptions | None = None
    loss_weight: float = 1.0

    @property
    def prefix(self) -> str:
        """What its images' names begin with."""
        return "" if self.name is None else f"{self.name}/"


def _folder(name: str) -> Path:
    """A shipped folder: inside the installed package, or next to it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def builtin_base(path: str) -> Path | None:
    """The folder of a built-in base model by its name, in diffusers' layout; None for any other path."""
    return _PACKAGE / "pocket" / BUILTIN_BASES[path] if path in BUILTIN_BASES else None


def pocket_folder() -> Path:
    """The built-in base model that "pocket" names, in diffusers' layout."""
    return _PACKAGE / "pocket" / BUILTIN_BASES["pocket"]


def shipped_configs() -> list[str]:
    """The names of the configurations that come with sdlora."""
    return sorted(path.stem for path in _folder("configs").glob("*.toml"))


def counted_file() -> Path:
    """The file of what shipped configurations need, counted at their families' true shapes."""
    return _folder("configs") / "counted.json"


def shipped_config(name: str) -> Path | None:
    """The file of a shipped configuration, or None if no configuration has that name."""
    return _folder("configs") / f"{name}.toml" if name in shipped_configs() else None


def shipped_sets() -> list[str]:
    """The names of the sample sets that come with sdlora."""
    return sorted(path.name for path in _folder("datasets").iterdir() if path.is_dir() and any(path.glob("*.png")))


def resolve_data_folder(text: str) -> Path:
    """The local folder of a data setting: a path, "builtin:NAME" or "builtin:NAME/holdout", or a URL to download.

    Raises:
        ConfigError: No shipped set has that name.
        SdloraError: The URL is invalid, or its store cannot be reached.
    """
    if is_url(text):
        return download_set(text)
    if not text.startswith(BUILTIN):
        return Path(text).expanduser()
    name, _, part = text.removeprefix(BUILTIN).partition("/")
    if name not in shipped_sets() or part not in ("", "holdout"):
        near = difflib.get_close_matches(name, shipped_sets(), n=1)
        hint = f" Did you mean {BUILTIN}{near[0]}?" if near else ""
        raise ConfigError(f"No shipped set is named {text!r}. Available: {', '.join(shipped_sets())}.{hint}")
    return _folder("datasets") / name / part
