"""A run's events in TensorBoard and Weights & Biases, through Accelerate's trackers.

Fed by `run` beside the run folder's own files; nothing is read back from a tracker.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from sdlora.config.schema import RunConfig
from sdlora.errors import ConfigError
from sdlora.events import CopyChecked, EpochDone, Event, Notice, PreviewsDone, StepDone
from sdlora.run.folder import RunFolder

FOLDER = "tensorboard"
_PROJECT = "sdlora"
_BANDS = ("000-199", "200-399", "400-599", "600-799", "800-999")


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ConfigError: One is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers = ['{name}'] needs a package that is not installed: pip install {name}.")


class Trackers:
    """Reports a run's events to the trackers of its configuration.

    They are opened by the first event that has a step. What TensorBoard holds from that step on, because a run was
    killed after its last checkpoint, is dropped; Weights & Biases keeps the first value of every step, which an exact
    resume repeats.

    Args:
        config: The run's.
        folder: The run's; TensorBoard writes into `tensorboard` in it.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self._open: dict[str, GeneralTracker | Callable[[], GeneralTracker]] | None = None
        self._step = 0

    def record(self, event: Event) -> Notice | None:
        """Report an event.

        Returns:
            A notice if a tracker fails, which is not asked again; the others and training go on.
        """
        if not self._config.train.trackers or not isinstance(event, (StepDone, EpochDone, CopyChecked, PreviewsDone)):
            return None
        if isinstance(event, (StepDone, EpochDone)):
            self._step = event.step
        if self._open is None:
            self._open = {name: partial(self._start, name) for name in self._config.train.trackers}
        failed = [message for name in list(self._open) if (message := self._attempt(name, event)) is not None]
        return Notice(" ".join([*failed, "The run continues."])) if failed else None

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in (self._open or {}).values():
            if isinstance(tracker, GeneralTracker):
                with suppress(Exception):  # as in `record`
                    tracker.finish()

    def _attempt(self, name: str, event: StepDone | EpochDone | CopyChecked | PreviewsDone) -> str | None:
        """Report an event to one tracker, which is started before its first; what went wrong, if anything did."""
        assert self._open is not None
        try:
            tracker = self._open[name]
            if not isinstance(tracker, GeneralTracker):
                self._open[name] = tracker = tracker()
            if isinstance(event, PreviewsDone):
                _log_images(tracker, event.files, self._step)
            else:
                tracker.log(scalars(event), step=self._step)
        except Exception as error:  # a boundary: each tracker has its own errors, and none may end a run
            del self._open[name]
            return f"Tracking by {name} ends here: {type(error).__name__}: {error}."
        return None

    def _start(self, name: str) -> GeneralTracker:
        # The settings that the LoRA file holds as well: neither folders nor captions.
        sections = {name: getattr(self._config, name).model_dump() for name in ("lora", "train", "timesteps", "loss")}
        settings = {
            f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
            for section, values in sections.items()
            for key, value in values.items()
        }
        if name == "tensorboard":
            logs = self._folder.path / FOLDER
            is_new = not logs.exists()
            tracker = TensorBoardTracker(".", logs, purge_step=self._step)
        else:
            started = self._folder.config.stat().st_mtime_ns
            number = hashlib.blake2b(f"{self._folder.path.resolve()} {started}".encode(), digest_size=8).hexdigest()
            is_new = True  # the same settings again do no harm there
            tracker = WandBTracker(
                _PROJECT, name=self._folder.name, id=number, resume="allow", dir=str(self._folder.path)
            )
        tracker.start()
        if is_new:
            tracker.store_init_configuration(settings)
        return tracker


def scalars(event: StepDone | EpochDone | CopyChecked) -> dict[str, float]:
    """The numbers of an event, by name."""
    if isinstance(event, StepDone):
        return {"loss/step": event.loss, "learning_rate": event.lr, "seconds_per_step": event.seconds}
    if isinstance(event, CopyChecked):
        return {"copies/share": event.share, "copies/highest_similarity": event.similarity}
    found: Mapping[str, float | None] = {
        "epoch": float(event.epoch),
        "loss/epoch": event.train_loss,
        "loss/validation": event.validation_loss,
        **dict(zip([f"loss_by_timestep/{band}" for band in _BANDS], event.train_bands or (), strict=False)),
        **dict(zip([f"validation_by_timestep/{band}" for band in _BANDS], event.validation_bands or (), strict=False)),
        **dict(zip([f"validation_change/{band}" for band in _BANDS], event.validation_change or (), strict=False)),
    }
    return {name: value for name, value in found.items() if value is not None}


def _log_images(tracker: Any, files: Sequence[str], step: int) -> None:
    for file in map(Path, files):
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        if tracker.name == "tensorboard":
            tracker.log_images({f"previews/{file.stem}": pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({f"previews/{file.stem}": [pixels]}, step=step)
