"""Which files, folders and stores may be named in the studio, whose visitors must not reach the whole machine.

Called wherever a page takes in a path or a recipe, before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.common.bundled import BUILTIN, resolve_data_folder
from sdlora.common.remote import check_url, is_url
from sdlora.config.toml import locations
from sdlora.errors import ConfigError

from .folders import Studio, StudioError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def check_locations(studio: Studio, document: Mapping[str, Any]) -> None:
    """Check every file, folder and URL that a recipe names.

    Args:
        studio: Knows what may be read.
        document: The recipe as nested tables, which need not be valid.

    Raises:
        ConfigError: One of them may not be read.
    """
    for option, text in locations(document):
        if option in ("base.path", "base.components", "base.vae", "preview.base"):
            check_model(studio, text)
        else:
            check_location(studio, text)


def check_model(studio: Studio, text: str) -> None:
    """Check a model's location, which may also be its id on the Hugging Face Hub.

    Raises:
        ConfigError: It may not be read.
    """
    if is_url(text) or not _HUB_ID.fullmatch(text) or to_path(text).exists():
        check_location(studio, text)


def check_location(studio: Studio, text: str) -> None:
    """Check the location of images, a file or a folder.

    Raises:
        ConfigError: It may not be read.
    """
    if is_url(text):
        _check_store(studio, text)
    elif not text.startswith(BUILTIN) or ".." in text:
        studio.allowed(to_path(text))


def images_folder(studio: Studio, images: str) -> Path:
    """The folder that a choice of images stands for.

    Args:
        studio: Knows what may be read.
        images: A set's name in the studio, whose folder may not exist yet; the path of a folder; or "builtin:NAME".

    Raises:
        StudioError: It is not a valid name, or there is no such folder.
        ConfigError: That is no shipped set, or outside of what may be read.
    """
    if images.startswith(BUILTIN):
        return resolve_data_folder(images)
    if not re.search(r"[\\/]", images):
        return studio.image_set(images).resolve()
    folder = to_path(images)
    if not folder.is_absolute():
        raise StudioError(
            f"{images!r} is only a part of a path. Give the whole path of a folder, such as "
            f"{str(Path.home() / 'images')!r}, or a name without slashes for a set in the studio."
        )
    if not studio.allowed(folder).is_dir():
        raise StudioError(f"There is no folder {images!r}, and none was made. Check the spelling.")
    return folder


def to_path(text: str) -> Path:
    """A path as it was typed, with ~ replaced by the home folder.

    Raises:
        ConfigError: No file can have this name.
    """
    try:
        path = Path(text).expanduser()
        path.resolve().exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{text[:200]!r} is not a valid path ({error}). Check the spelling.") from error
    return path


def _check_store(studio: Studio, url: str) -> None:
    """Check that a URL is in one of the stores that the studio was started with."""
    check_url(url)
    is_plain = "::" not in url and ".." not in url.split("/") and "%" not in url and "\\" not in url
    if not is_plain or not any(url == store or url.startswith(f"{store}/") for store in studio.stores):
        raise ConfigError(
            f"{url} is in a store that this studio was not started with. Upload the images, or start it with "
            "--store and the URL of the folder, as in: sdlora ui --store s3://BUCKET/FOLDER"
        )
