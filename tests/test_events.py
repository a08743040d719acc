"""Events as JSON: their keys are those of files that exist, whatever the fields are called."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sdlora.events import (
    CopyChecked,
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PlannedSet,
    Progress,
    StepDone,
    fields_from_json,
    key_of,
    to_json,
)

KEYS = {
    PlanMade: "pictures heldout_pictures split_off repeats epochs exposures_per_picture batch_size "
    "gradient_accumulation_steps steps trained_parameters base_parameters targets device precision sets "
    "preserved_pictures peak_bytes memory_bytes previews previews_every_steps",
    PlannedSet: "name pictures repeats exposures_per_picture",
    StepDone: "epoch step loss lr examples visits timesteps losses seconds",
    EpochDone: "epoch step train_loss heldout_loss seconds train_bands heldout_bands heldout_change",
    CopyChecked: "epoch verdict reason share share_lower_bound false_alarm_rate most_alike likeness seconds",
    Exported: "file epoch num_modules max_error bytes",
    Progress: "phase done total",
    Notice: "message",
}


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_keys_in_files_never_change(kind: type[Event]) -> None:
    assert [key_of(field) for field in fields(kind)] == KEYS[kind].split()


def test_event_read_back_from_json_is_equal() -> None:
    event = StepDone(1, 2, 0.5, 1e-3, ["a.png"], [0], [500], [0.5], 0.1)
    document = event.to_json()
    assert document["event"] == "step" and document["visits"] == [0]
    assert StepDone(**fields_from_json(StepDone, document)) == event
    assert fields_from_json(StepDone, {"unknown": 1}) == {}


def test_containers_of_dataclasses_become_json() -> None:
    one = PlannedSet("cats", 3, 2, 8)
    written = {"name": "cats", "pictures": 3, "repeats": 2, "exposures_per_picture": 8}
    assert to_json({"sets": [one], "pair": (one, 1)}) == {"sets": [written], "pair": (written, 1)}
