"""Content of a run: its settings, metrics, copy checks and files; and comparing and deleting runs.

Read from the run's folder and cached until a file changes, because every open page polls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.common.bundled import resolve_data_folder
from sdlora.common.run_files import Metrics, read_metrics
from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config, options
from sdlora.copycheck.verdict import EpochCheck, read_checks, recommend
from sdlora.data.batches import assign_buckets
from sdlora.data.checks import image_files
from sdlora.data.images import crop_to_bucket, load_image
from sdlora.errors import DataError, SdloraError

from .bin import Bin
from .folders import Studio, StudioError


@dataclass(frozen=True, eq=False)
class RunView:
    """A run's content."""

    name: str
    folder: Path
    config: RunConfig
    metrics: Metrics  # its steps and epochs so far
    checks: dict[int, EpochCheck]  # copy checks by epoch
    previews: dict[int, list[Path]]  # previews by epoch, sorted by name
    loras: dict[int, Path]  # LoRA files by epoch
    key: str  # identifies the run, even if another one gets its name later

    def recommended(self) -> tuple[int, str] | None:
        """The epoch to keep so far, and why; None until the first one is complete and checked for copies."""
        is_checked = self.config.copycheck.enabled and self.config.preview.enabled
        judged = [epoch for epoch in self.loras if epoch in self.checks or not is_checked]
        if not judged:
            return None
        return recommend(self.checks, self.metrics.validation_losses(), max(judged))

    def training_images(self) -> Mapping[str, Image.Image]:
        """What it trained on, by name and cropped as it was trained; grey where an image is no longer there."""
        preview_px = 512
        if self.previews:
            with Image.open(next(iter(self.previews.values()))[0]) as image:
                preview_px = max(image.size)
        return _Gallery(self.config, preview_px)


def read_run(studio: Studio, name: str) -> RunView | None:
    """The content of a run, or None if it has not started."""
    folder = studio.run(name)
    if not (folder / "config.toml").is_file():
        _LAST.pop(folder, None)
        return None
    marks, last = _marks(folder), _LAST.get(folder)
    if last is None or last[0] != marks:
        _LAST[folder] = last = marks, _read(folder, name)
    return last[1]


def _marks(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Modification times and sizes of all files that are shown."""
    files = [
        folder / "config.toml",
        folder / "metrics.jsonl",
        *sorted([*folder.glob("epochs/*/[!.]*"), *folder.glob("steps/*/[!.]*")]),
    ]
    found = []
    for file in files:
        with suppress(FileNotFoundError):  # being replaced at this moment
            facts = file.stat()
            found.append((str(file), facts.st_mtime_ns, facts.st_size))
    return tuple(found)


# The content of every run as it was read last: a limit would have all of them read again at every poll.
_LAST: dict[Path, tuple[tuple[tuple[str, int, int], ...], RunView]] = {}


def _read(folder: Path, name: str) -> RunView:
    epochs = folder / "epochs"
    numbers = sorted(int(path.name) for path in epochs.glob("*") if path.name.isdecimal())
    loras = {number: epochs / str(number) / "adapter.safetensors" for number in numbers}
    previews = {number: sorted((epochs / str(number) / "previews").glob("[!.]*.png")) for number in numbers}
    previews = {number: files for number, files in previews.items() if files}
    # The proof is written last: without it the file may be incomplete.
    loras = {number: file for number, file in loras.items() if file.with_name("proof.json").is_file()}
    config, metrics = load_config(str(folder / "config.toml")), read_metrics(folder / "metrics.jsonl")
    key = f"{folder.resolve()} {(folder / 'config.toml').stat().st_mtime_ns}"
    return RunView(name, folder, config, metrics, read_checks(epochs), previews, loras, key)


class _Gallery(Mapping[str, Image.Image]):
    """Training images by name, read when asked for."""

    def __init__(self, config: RunConfig, preview_px: int) -> None:
        data = config.data
        self._files: dict[str, Path] = {}
        for one in filter(None, (data.validation_set, *data.sets)):
            folder = resolve_data_folder(one.folder)
            files = image_files(folder, recursive=one.recursive) if folder.is_dir() else ()
            self._files |= {one.prefix + path.relative_to(folder).as_posix(): path for path in files}
        self._data, self._px = data, data.resolution_px or preview_px

    def __getitem__(self, name: str) -> Image.Image:
        try:
            image = load_image(self._files[name], self._data.background)
        except (KeyError, OSError, DataError):
            return Image.new("RGB", (self._px, self._px), "#888888")
        return crop_to_bucket(image, *assign_buckets([image.size], self._px, self._data.bucket_options)[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


# --- Old runs ---------------------------------------------------------------------------------------------------------


def differences(first: RunConfig, second: RunConfig) -> list[tuple[str, Any, Any]]:
    """The settings in which two runs differ: name, value of the first, value of the second."""
    other = dict(options(second))
    return [(name, value, other.get(name)) for name, value in options(first) if value != other.get(name)]


def settings_of(studio: Studio, name: str) -> RunConfig:
    """The settings of a run, started or waiting.

    Raises:
        StudioError: There is no such run, or its settings are not valid any more.
    """
    for file in (studio.run(name) / "config.toml", studio.job_config(name)):
        if file.is_file():
            try:
                return load_config(str(file))
            except SdloraError as error:
                raise StudioError(f"The settings of {name!r} cannot be used: {error}") from error
    raise StudioError(f"There is no run called {name!r}.")


def delete_run(studio: Studio, name: str) -> None:
    """Move a run's folder into the bin; its training images, which are elsewhere, stay.

    Raises:
        StudioError: There is no such run.
    """
    folder = studio.run(name)
    if folder.is_symlink() or not (folder / "config.toml").is_file():
        raise StudioError(f"There is no run called {name!r} that could be deleted.")
    Bin(studio).record(studio.runs, f"{name} was deleted", move=[name])
    _LAST.pop(folder, None)


def put_back(studio: Studio, key: str) -> str:
    """Put a deleted run back; returns what was done.

    Raises:
        StudioError: It is no longer in the bin, or there is another run by its name.
    """
    change = Bin(studio).find(key)
    if change is None or change.folder != str(studio.runs.absolute()):
        raise StudioError("This run is not in the bin any more.")
    Bin(studio).put_back(change)
    return f"{', '.join(change.moved)} is back."
