"""The studio's files: runs, image sets, jobs, and the images that a browser may see, all below one folder.

Used by everything in `ui.state`; also checks names that come from the browser.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from filelock import FileLock

from sdlora.errors import ConfigError, SdloraError

_RUN_NAME = re.compile(r"\w[\w. -]{0,99}")
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_RESERVED_NAMES = {"pictures", "bases"}  # folders beside the runs


class StudioError(SdloraError):
    """A request to the studio cannot be fulfilled; the message says why and what to do instead."""

    exit_code = 2


class Studio:
    """The studio's folder.

    Args:
        runs: Contains a folder per run, `pictures` with a folder per image set, and `.studio` for everything else.
        any_folder: Whether images and bases may be anywhere on this machine; only if nobody else can reach the page.
        stores: URLs that recipes may name, and everything below them.

    Raises:
        StudioError: A run or an image set is asked for by a name that is not valid.
    """

    def __init__(self, runs: Path, any_folder: bool = True, stores: tuple[str, ...] = ()) -> None:
        self.runs, self.any_folder, self.stores = runs, any_folder, stores
        self.sets = runs / "pictures"
        self.own = runs / ".studio"
        self.jobs = self.own / "jobs"
        self.logs = self.own / "logs"
        self.draft = self.own / "draft.json"
        self.bin = self.own / "bin"
        self.folder_notes = self.own / "folders.json"
        # The only folder that images are served from; sdlora encoded every file in it itself.
        self.shown = self.own / "shown"

    def create(self) -> None:
        """Create missing folders."""
        for folder in (self.sets, self.jobs, self.logs, self.shown, self.bin):
            folder.mkdir(parents=True, exist_ok=True)

    def lock(self) -> FileLock:
        """The lock for changing jobs and starting processes, across processes."""
        return FileLock(self.own / "lock", timeout=10)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.runs / run_name(name)

    def job_config(self, name: str) -> Path:
        """Configuration of a job."""
        return self.jobs / f"{run_name(name)}.toml"

    def job_record(self, name: str) -> Path:
        """Record of a job."""
        return self.jobs / f"{run_name(name)}.json"

    def log(self, name: str) -> Path:
        """Stderr of a run's process."""
        return self.logs / f"{run_name(name)}.log"

    def image_set(self, name: str) -> Path:
        """The folder of an image set."""
        if name != safe_name(name):
            odd = ", ".join(sorted(set(re.findall(r"[^\w. -]", name))))
            raise StudioError(
                f"A set cannot be called {name!r}{f' because of {odd}' if odd else ''}. A name may have up to 80 "
                f"letters, digits, spaces, '.', '-' and '_', such as {safe_name(name, 'my images')!r}."
            )
        return self.sets / name

    def owns(self, folder: Path) -> bool:
        """Whether a folder of images is one of the studio's own sets."""
        return folder.resolve().parent == self.sets.resolve()

    def allowed(self, folder: Path) -> Path:
        """The same folder, if the studio may read it.

        Raises:
            ConfigError: It is outside of the studio's folder, and other people can reach the page.
        """
        if not self.any_folder and not folder.resolve().is_relative_to(self.runs.resolve()):
            raise ConfigError(
                f"{str(folder)!r} is outside of the studio's folder and cannot be used over the network. Upload the "
                "images, or open the studio on the machine itself."
            )
        return folder


def run_name(name: str) -> str:
    """The same name, if it is valid for a run.

    Raises:
        StudioError: It has characters other than letters, digits, spaces, '.', '-' and '_', or is reserved.
    """
    is_reserved = _is_reserved(name) or name.lower() in _RESERVED_NAMES
    if is_reserved or not _RUN_NAME.fullmatch(name) or name != name.rstrip(". "):
        raise StudioError(
            f"{name!r} is not a valid name for a run; use up to 100 letters, digits, spaces, '.', '-' and '_', "
            "starting with a letter or digit. 'pictures', 'bases' and device names such as 'con' are reserved."
        )
    return name


def is_run_name(name: str) -> bool:
    """Whether a name is valid for a run."""
    try:
        run_name(name)
    except StudioError:
        return False
    return True


def safe_name(text: str, fallback: str = "image") -> str:
    """A file name that is safe on every system, close to what follows the last slash or backslash of a text.

    If nothing of it can be kept, the name is `fallback`.
    """
    last = re.split(r"[\\/]", unicodedata.normalize("NFC", text))[-1]
    found = re.search(r"\.[A-Za-z0-9]{1,5}\Z", last)
    stem, ending = (last[: found.start()], found[0]) if found else (last, "")
    kept = re.sub(r"[^\w. -]", "_", stem).strip(". ")[:80].rstrip(". ")
    if not re.search(r"\w", kept):
        kept = fallback
    return f"_{kept}{ending}" if _is_reserved(kept) or kept.startswith("-") else kept + ending


def _is_reserved(name: str) -> bool:
    return name.split(".")[0].strip().lower() in _DEVICE_NAMES
