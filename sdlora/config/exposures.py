"""Exposures: how often each image is seen in a whole run, which is what decides whether a LoRA learns or copies.

Part of `schema`, which turns `train.exposures` into repeats; the run and the estimates show the sentences.
"""

from __future__ import annotations

from typing import Any

from sdlora.config.schema_training import TrainConfig

FEW, MANY = 20, 200


def spread_exposures(document: dict[str, Any]) -> dict[str, Any]:
    """A document whose repeats follow from `train.exposures`, if that is set.

    Repeats are whole numbers, so that 100 exposures in 3 epochs become 3 x 33.

    Raises:
        ValueError: `data.repeats` asks for other exposures.
    """
    train, data = document.get("train", {}), document.get("data", {})
    if not isinstance(train, dict) or not isinstance(data, dict):
        return document
    exposures, epochs = train.get("exposures"), train.get("epochs", TrainConfig.model_fields["epochs"].default)
    if not isinstance(exposures, int) or not isinstance(epochs, int) or exposures < 1 or epochs < 1:
        return document  # unset, or refused with its own message
    highest = max(1, round(exposures / epochs))
    sets = data.get("sets")
    if sets and isinstance(sets, list) and all(isinstance(one, dict) for one in sets):
        repeats = [one.get("repeats", data.get("repeats", 1)) for one in sets]
        if not all(isinstance(count, int) and count > 0 for count in repeats):
            return document
        spread = [
            one | {"repeats": max(1, round(highest * count / max(repeats)))}
            for one, count in zip(sets, repeats, strict=True)
        ]
        return document | {"data": data | {"sets": spread}}
    repeats = data.get("repeats", highest)
    if repeats != highest:
        raise ValueError(
            f"data.repeats = {repeats} in {epochs} epochs is not train.exposures = {exposures}: give one of them (for "
            f"these repeats, train.exposures = {repeats * epochs})"
        )
    return document | {"data": data | {"repeats": highest}}


def exposures_warning(fewest: int, most: int) -> str | None:
    """A sentence where images are seen less than 20 or more than 200 times in a run, else None.

    Args:
        fewest: Exposures of the image that is seen least.
        most: Exposures of the image that is seen most.
    """
    if most < FEW:
        return (
            f"Each image is seen {most} times, too few for a LoRA to learn much: 80 to 120 exposures are usual "
            "(train.exposures = 100)."
        )
    if most > MANY:
        return (
            f"Each image is seen {most} times. Beyond {MANY} exposures LoRAs tend to reproduce their training images; "
            "80 to 120 are usual (train.exposures = 100)."
        )
    if fewest < FEW:
        return f"Some images are seen only {fewest} times, others {most} times; the former are hardly learned."
    return None
