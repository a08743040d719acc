"""The events of a run, as values: the only output of the trainer and the run besides their files.

The progress bar, `metrics.jsonl`, `state.json`, `--json` and the studio read the same events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def saved_as(key: str) -> dict[str, str]:
    """The metadata of a dataclass field that is written to JSON under another key than its name.

    Names in the code may change; keys in files may not.
    """
    return {"key": key}


def key_of(field: dataclasses.Field[Any]) -> str:
    """The key of a field in JSON."""
    key: str = field.metadata.get("key", field.name)
    return key


def to_json(value: Any) -> Any:
    """A dataclass, or any container of them, as JSON objects, arrays and values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key_of(field): to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_json(entry) for entry in value)
    return value


def fields_from_json(cls: type[DataclassInstance], document: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for a dataclass from a JSON object; unknown keys are ignored."""
    return {field.name: document[key_of(field)] for field in dataclasses.fields(cls) if key_of(field) in document}


@dataclass(frozen=True)
class Event:
    """Base of all events; `name` is the value of the "event" key in JSON."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The event as a JSON object, its name first."""
        return {"event": self.name, **to_json(self)}


@dataclass(frozen=True)
class PlannedSet:
    """One data set of a run with several."""

    name: str
    images: int = field(metadata=saved_as("pictures"))
    repeats: int
    exposures_per_image: int = field(metadata=saved_as("exposures_per_picture"))


@dataclass(frozen=True)
class PlanMade(Event):
    """The schedule of a run, for a person to check before it starts.

    `split_off` names the validation images that were taken from the training folder itself. With several sets,
    `repeats` and `exposures_per_image` are the highest, and `sets` lists each; it is empty for one set. `peak_bytes` is
    the estimated peak memory and `memory_bytes` the memory available, both None for base models so small that they fit
    anywhere. `previews` is the number drawn of the base model, after every epoch, and `previews_every_steps` steps
    within it; 0 steps are none.
    """

    name = "plan"
    images: int = field(metadata=saved_as("pictures"))
    validation_images: int = field(metadata=saved_as("heldout_pictures"))
    split_off: list[str]
    repeats: int
    epochs: int
    exposures_per_image: int = field(metadata=saved_as("exposures_per_picture"))
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    trained_parameters: int
    base_parameters: int
    targets: list[str]
    device: str
    precision: str
    sets: list[PlannedSet] = field(default_factory=list)
    prior_images: int = field(default=0, metadata=saved_as("preserved_pictures"))
    peak_bytes: int | None = None
    memory_bytes: int | None = None
    previews: int = 0
    previews_every_steps: int = 0


@dataclass(frozen=True)
class Notice(Event):
    """A message that the user should read; the run continues."""

    name = "notice"
    message: str


@dataclass(frozen=True)
class Progress(Event):
    """Progress of a phase other than training, such as "previews" or "cache pictures"."""

    name = "progress"
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class StepRehearsed(Event):
    """The duration of a step, measured before training so that the time left can be estimated."""

    name = "rehearsal"
    seconds: float


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step. Lists hold one entry per image of the batch."""

    name = "step"
    epoch: int
    step: int
    loss: float
    lr: float
    examples: list[str]
    exposures: list[int] = field(metadata=saved_as("visits"))
    timesteps: list[int]
    losses: list[float]
    seconds: float


@dataclass(frozen=True)
class EpochDone(Event):
    """All steps of an epoch are done; epoch 0 is the base before training.

    Bands are [0, 200), [200, 400), [400, 600), [600, 800) and [800, 1000) of the timesteps.

    Attributes:
        train_bands: Training loss by band; None for a band without any exposure in the epoch.
        validation_bands: Validation loss by band.
        validation_change: Validation loss by band, with the adapter minus without; below 0 where it helps.
    """

    name = "epoch"
    epoch: int
    step: int
    train_loss: float | None
    validation_loss: float | None = field(metadata=saved_as("heldout_loss"))
    seconds: float
    train_bands: list[float | None] | None = None
    validation_bands: list[float] | None = field(default=None, metadata=saved_as("heldout_bands"))
    validation_change: list[float] | None = field(default=None, metadata=saved_as("heldout_change"))


@dataclass(frozen=True)
class CheckpointDue(Event):
    """The trainer is between two steps, so its state may be saved."""

    name = "checkpoint"
    epoch: int
    step: int


@dataclass(frozen=True)
class PreviewsDue(Event):
    """The trainer is between two steps of an epoch, where previews were asked for; its state was saved."""

    name = "previews due"
    epoch: int
    step: int


@dataclass(frozen=True)
class PreviewsDone(Event):
    """Previews are saved: of an epoch, or of a step within it."""

    name = "previews"
    epoch: int
    files: list[str]
    seconds: float
    step: int | None = None


@dataclass(frozen=True)
class CopyChecked(Event):
    """The previews of an epoch were compared with the training images.

    Attributes:
        epoch: 0 is the base model.
        verdict: "clean", "watch" or "copying"; `reason` says why in one sentence.
        share: The share of previews that significantly match a training image, in [0, 1].
        share_lower_bound: Its lower confidence bound at 99.9 %.
        false_alarm_rate: The probability of "copying" if each preview is significant with probability 2 % by itself.
        most_similar: The training image with the best match, and the preview's file.
        similarity: Their similarity, in [0, 1]; 1 is a copy.
    """

    name = "copycheck"
    epoch: int
    verdict: str
    reason: str
    share: float
    share_lower_bound: float
    false_alarm_rate: float
    most_similar: tuple[str, str] = field(metadata=saved_as("most_alike"))
    similarity: float = field(metadata=saved_as("likeness"))
    seconds: float


@dataclass(frozen=True)
class Exported(Event):
    """A LoRA file was written and verified by loading it back through diffusers."""

    name = "export"
    file: str
    epoch: int
    num_modules: int
    max_error: float
    bytes: int


@dataclass(frozen=True)
class RunDone(Event):
    """The run finished."""

    name = "done"
    file: str
    folder: str
    seconds: float
