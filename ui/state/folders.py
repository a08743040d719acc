"""Where the studio keeps what: runs, image sets, jobs and the images that a browser may see.

Everything that the studio writes lies below one folder.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sdlora.errors import ConfigError, SdloraError

_RUN_NAME = re.compile(r"\w[\w. -]{0,99}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_TAKEN = {"pictures"}


class StudioError(SdloraError):
    """Something that the studio was asked for cannot be done; the message says why and what to do instead."""

    exit_code = 2


@dataclass(frozen=True)
class Studio:
    """The studio's folder.

    Args:
        runs: Holds a folder for every run, `images` with a folder for every set, and `.studio` with all else.
        any_folder: Whether images and bases may lie elsewhere on this machine: only where nobody but its user can
            reach the page.
    """

    runs: Path
    any_folder: bool = True

    @property
    def sets(self) -> Path:
        """Image sets that came through the browser."""
        return self.runs / "pictures"

    @property
    def jobs(self) -> Path:
        """What waits, runs and ran: a configuration and a record for each."""
        return self.runs / ".studio" / "jobs"

    @property
    def logs(self) -> Path:
        """What the training processes said."""
        return self.runs / ".studio" / "logs"

    @property
    def shown(self) -> Path:
        """The only folder that images are served from; sdlora encoded every file in it."""
        return self.runs / ".studio" / "shown"

    @property
    def draft(self) -> Path:
        """The recipe that is being written."""
        return self.runs / ".studio" / "draft.json"

    def create(self) -> None:
        """Make the folders that are not there yet."""
        for folder in (self.sets, self.jobs, self.logs, self.shown):
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> FileLock:
        """Held by whoever changes jobs or starts a process, in whichever process that is."""
        return FileLock(self.runs / ".studio" / "lock", timeout=10)

    def run(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            StudioError: It is no name of a run.
        """
        return self.runs / run_name(name)

    def job_config(self, name: str) -> Path:
        """The configuration that a job was started with."""
        return self.jobs / f"{run_name(name)}.toml"

    def job_record(self, name: str) -> Path:
        """How a job stands."""
        return self.jobs / f"{run_name(name)}.json"

    def log(self, name: str) -> Path:
        """What a run's process wrote to stderr."""
        return self.logs / f"{run_name(name)}.log"

    def image_set(self, name: str) -> Path:
        """The folder of an image set.

        Raises:
            StudioError: It is no name of a set.
        """
        if name != safe_name(name):
            raise StudioError(f"{name!r} is no name for a set of images. Use letters, digits, spaces, '-' and '_'.")
        return self.sets / name

    def allowed(self, folder: Path) -> Path:
        """A folder that may be read.

        Raises:
            ConfigError: It lies elsewhere on this machine, and other people can reach the page.
        """
        if not self.any_folder and not folder.resolve().is_relative_to(self.runs.resolve()):
            raise ConfigError(
                f"{str(folder)!r} is outside of the studio's folder, which is all that can be used over the network. "
                "Upload the images, or open the studio on the machine itself."
            )
        return folder


def run_name(name: str) -> str:
    """The same name, if a run may have it.

    Raises:
        StudioError: It holds other characters than letters, digits, spaces, '.', '-' and '_', or is taken.
    """
    if not _RUN_NAME.fullmatch(name) or name != name.rstrip(". ") or _is_reserved(name) or name.lower() in _TAKEN:
        raise StudioError(
            f"{name!r} cannot be a run's name. Use up to 100 letters, digits, spaces, '.', '-' and '_', beginning with "
            "a letter or digit; 'images' and names of devices, such as 'con', are taken."
        )
    return name


def safe_name(text: str, fallback: str = "image") -> str:
    """A file name without folders, controls or meaning to any system, as near to `text` as can be.

    Args:
        text: From anywhere; only what follows the last slash or backslash counts.
        fallback: If nothing of it can stay.
    """
    last = re.split(r"[\\/]", unicodedata.normalize("NFC", text))[-1]
    found = re.search(r"\.[A-Za-z0-9]{1,5}\Z", last)
    stem, ending = (last[: found.start()], found[0]) if found else (last, "")
    kept = re.sub(r"[^\w. -]", "_", stem).strip(". ")[:80].rstrip(". ")
    if not re.search(r"\w", kept):
        kept = fallback
    return f"_{kept}{ending}" if _is_reserved(kept) or kept.startswith("-") else kept + ending


def _is_reserved(name: str) -> bool:
    return name.split(".")[0].strip().lower() in _DEVICES
