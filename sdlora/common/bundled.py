"""Where the files that come with sdlora are, in a checkout and in an installed package alike."""

from __future__ import annotations

import difflib
from pathlib import Path

from sdlora.common.remote import bring_set, is_url
from sdlora.errors import ConfigError

BUILTIN = "builtin:"
_PACKAGE = Path(__file__).parents[1]


def _folder(name: str) -> Path:
    """A shipped folder: inside the installed package, or beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def pocket_folder() -> Path:
    """The built-in base, in diffusers' layout."""
    return _PACKAGE / "pocket" / "weights"


def shipped_configs() -> list[str]:
    """The names of the configurations that come with sdlora."""
    return sorted(path.stem for path in _folder("configs").glob("*.toml"))


def shipped_config(name: str) -> Path | None:
    """The file of a shipped configuration, or None if there is none of that name."""
    return _folder("configs") / f"{name}.toml" if name in shipped_configs() else None


def shipped_sets() -> list[str]:
    """The names of the sample sets that come with sdlora."""
    return sorted(path.name for path in _folder("datasets").iterdir() if path.is_dir() and any(path.glob("*.png")))


def resolve_data_folder(text: str) -> Path:
    """The folder that a setting means: "builtin:NAME" (or "builtin:NAME/holdout") is a shipped set, a URL is fetched.

    Raises:
        ConfigError: There is no such shipped set.
        SdloraError: A URL cannot be used, or its store cannot be reached.
    """
    if is_url(text):
        return bring_set(text)
    if not text.startswith(BUILTIN):
        return Path(text).expanduser()
    name, _, part = text.removeprefix(BUILTIN).partition("/")
    if name not in shipped_sets() or part not in ("", "holdout"):
        near = difflib.get_close_matches(name, shipped_sets(), n=1)
        hint = f" Did you mean {BUILTIN}{near[0]}?" if near else ""
        raise ConfigError(f"There is no shipped set {text!r}. There are: {', '.join(shipped_sets())}.{hint}")
    return _folder("datasets") / name / part
