"""Lengthening a run: more epochs than it was started with, from its newest checkpoint on.

Used by `resume`, which compares all other settings, and by the run, which records what was done for its page.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from sdlora.common.files import write_json
from sdlora.config.schema import RunConfig
from sdlora.config.schema_training import MAX_EPOCHS
from sdlora.config.toml import dump_toml, load_config
from sdlora.errors import ConfigError, OutputError
from sdlora.run.folder import RunFolder
from sdlora.training.trainer import Trainer


@dataclass(frozen=True)
class Lengthening:
    """One time that a run was lengthened.

    Attributes:
        step: Optimizer steps that were done before.
        epochs: Of the run from there on, `epochs_before` until then.
    """

    step: int
    epochs_before: int
    epochs: int


def with_length(config: RunConfig, started: RunConfig, folder: RunFolder) -> RunConfig:
    """A configuration to resume a run with, its epochs as many as it or its `train.exposures` ask for.

    An epoch exposes each image as often as when the run was started, so further exposures are further epochs.

    Args:
        config: As given now.
        started: The configuration in the run's folder.
        folder: The run's, for messages.

    Raises:
        ConfigError: The run would become shorter, or longer than the most epochs.
    """
    train, repeats, planned = config.train, started.data.repeats_range[1], started.train.epochs
    epochs = train.epochs
    if train.exposures is not None:
        is_planned = train.exposures == started.train.exposures
        epochs = max(epochs, planned if is_planned else math.ceil(train.exposures / repeats))
    if epochs > MAX_EPOCHS:
        raise ConfigError(
            f"train.exposures = {train.exposures} would take {epochs} epochs: an epoch of the run in {folder.path} "
            f"exposes each image {repeats} times, and the maximum is {MAX_EPOCHS} epochs, which is train.exposures = "
            f"{repeats * MAX_EPOCHS}. To train further, start a new run from this one's file, with lora.from_file = "
            f"'{folder.lora}'."
        )
    if epochs < planned:
        raise ConfigError(
            f"The run in {folder.path} has {planned} epochs, and resuming can lengthen a run but not shorten it to "
            f"{epochs}. To resume it, add --set train.epochs={planned}. The file of every epoch that is done is kept "
            f"in {folder.path / 'epochs'}."
        )
    if train.exposures is None and started.train.exposures is None:
        return config.model_copy(update={"train": train.model_copy(update={"epochs": epochs})})
    exposures = started.train.exposures if epochs == planned else repeats * epochs
    sets = [
        one.model_copy(update={"repeats": before.repeats})
        for one, before in zip(config.data.raw_sets, started.data.raw_sets, strict=False)
    ]
    data = config.data.model_copy(
        update={"raw_repeats": started.data.raw_repeats, "raw_sets": sets + config.data.raw_sets[len(sets) :]}
    )
    return config.model_copy(
        update={"data": data, "train": train.model_copy(update={"epochs": epochs, "exposures": exposures})}
    )


def record_length(config: RunConfig, folder: RunFolder, trainer: Trainer) -> str | None:
    """Keep a run's new length in its folder, and return what to say of it; None if it was not lengthened.

    Args:
        config: The configuration it is resumed with.
        folder: The run's.
        trainer: At the step from which it continues.
    """
    before, step = load_config(str(folder.config)).train.epochs, trainer.position.step
    if config.train.epochs == before:
        return None
    found = Lengthening(step, before, config.train.epochs)
    if step > 0:
        earlier = [one for one in _lengthenings(folder) if one != found]
        write_json(folder.lengthened, [asdict(one) for one in (*earlier, found)])
    # Last, so that a run that is killed in between is lengthened once more.
    folder.create(dump_toml(config))
    return _told(found, config) if step > 0 else None


def told_lengthenings(config: RunConfig, folder: RunFolder) -> list[str]:
    """What the page of a run says of each time that it was lengthened, in order."""
    return [_told(one, config) for one in _lengthenings(folder)]


def _lengthenings(folder: RunFolder) -> list[Lengthening]:
    if not folder.lengthened.is_file():
        return []
    try:
        return [Lengthening(**one) for one in json.loads(folder.lengthened.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{folder.lengthened} is damaged ({error}). Delete it: only the page of the run loses what it says."
        ) from error


def _told(one: Lengthening, config: RunConfig) -> str:
    """A sentence on what was done, and one on whether the result is that of a run of this length."""
    said = f"Lengthened at step {one.step} from {one.epochs_before} to {one.epochs} epochs."
    differences = []
    if config.train.lr_schedule != "constant" or 0 < config.train.warmup_steps < 1:
        differences.append("the learning rate follows its schedule over that length")
    if config.timesteps.coverage == "image":
        differences.append("each image's timesteps are spread over its exposures")
    if not differences:
        return f"{said} The result is that of a run planned with {one.epochs} epochs from the start."
    before = "1 epoch" if one.epochs_before == 1 else f"{one.epochs_before} epochs"
    return (
        f"{said} The steps before it are those of a run of {before}, in which {' and '.join(differences)}, so the "
        f"result is not exactly that of a run planned with {one.epochs} epochs from the start."
    )
