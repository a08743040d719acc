"""Runs that go on for longer than they were started for."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import digests, metrics, run, without_times

from sdlora.common.files import write_json
from sdlora.config.toml import dump_toml, load_config, parse_config
from sdlora.errors import ConfigError
from sdlora.events import Notice, PlanMade
from sdlora.run.folder import RunFolder
from sdlora.run.lengthen import told_lengthenings, with_length
from sdlora.run.resume import resumed_config


def notices(events: list[object]) -> str:
    return " ".join(event.message for event in events if isinstance(event, Notice))


def test_lengthened_run_ends_in_the_bytes_of_one_planned_so(tmp_path: Path, overrides: list[str]) -> None:
    options = [
        *overrides, f"cache.dir={tmp_path / 'shared'}", "timesteps.coverage=batch", "train.warmup_steps=3",
        "train.ema_decay=0.5", "train.exposures=4",
    ]  # fmt: skip
    whole, grown = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (whole, grown):
        folder.parent.mkdir()
    run(whole, [*options, "train.epochs=4", "train.exposures=8"])
    assert "Lengthened" not in notices(run(grown, options))
    longer = [*options, "train.epochs=3"]
    events = run(grown, longer, resume=True)
    assert "Lengthened at step 10 from 2 to 3 epochs. The result is that of a run" in notices(events)
    plan = next(event for event in events if isinstance(event, PlanMade))
    assert (plan.epochs, plan.repeats, plan.steps) == (3, 2, 15)
    # The same command again changes nothing, and exposures alone ask for whole epochs of as many.
    assert "Lengthened" not in notices(run(grown, longer, resume=True))
    run(grown, [*options, "train.exposures=7"], resume=True)
    assert digests(grown) == digests(whole)
    assert without_times(metrics(grown)) == without_times(metrics(whole))
    train = load_config(str(grown / "config.toml")).train
    assert (train.epochs, train.exposures) == (4, 8)
    page = (grown / "report.html").read_text(encoding="utf-8")
    assert "Lengthened at step 10 from 2 to 3 epochs." in page and "Lengthened at step 15 from 3 to 4 epochs." in page


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"timesteps": {"coverage": "none"}}, "The result is that of a run planned with 4 epochs"),
        ({}, "in which each image's timesteps are spread over its exposures, so the result is not exactly that of"),
        (
            {"timesteps": {"coverage": "batch"}, "train": {"lr_schedule": "cosine"}},
            "of a run of 2 epochs, in which the learning rate follows its schedule over that length, so",
        ),
        ({"train": {"lr_schedule": "cosine"}}, "over that length and each image's timesteps"),
    ],
)
def test_what_keeps_a_lengthened_run_from_equalling_one_planned_so_is_told(
    tmp_path: Path, settings: dict[str, dict[str, object]], expected: str
) -> None:
    folder, config = RunFolder(tmp_path, "n"), parse_config({"data": {"folder": "x"}, **settings}, name="n")
    assert told_lengthenings(config, folder) == []
    write_json(folder.lengthened, [{"step": 10, "epochs_before": 2, "epochs": 4}])
    (told,) = told_lengthenings(config, folder)
    assert told.startswith("Lengthened at step 10 from 2 to 4 epochs.") and expected in told


SETS = {"data": {"sets": [{"folder": "a"}, {"folder": "b", "repeats": 2}]}}


@pytest.mark.parametrize(
    ("started", "now", "expected"),
    [
        ({"epochs": 3}, {"epochs": 5}, (5, None, [1, 2])),
        ({"epochs": 3, "exposures": 60}, {"epochs": 5, "exposures": 60}, (5, 100, [10, 20])),
        ({"epochs": 3, "exposures": 60}, {"epochs": 3, "exposures": 100}, (5, 100, [10, 20])),
        ({"epochs": 3, "exposures": 60}, {"epochs": 3, "exposures": 61}, (4, 80, [10, 20])),
        ({"epochs": 3, "exposures": 100}, {"epochs": 3, "exposures": 100}, (3, 100, [16, 33])),
        ({"epochs": 5, "exposures": 100}, {"epochs": 5, "exposures": 60}, (5, 100, [10, 20])),
        ({"epochs": 5, "exposures": 100}, {"epochs": 3, "exposures": 100}, (5, 100, [10, 20])),
    ],
)
def test_more_exposures_are_more_epochs_of_the_same_repeats(
    started: dict[str, int], now: dict[str, int], expected: tuple[int, int | None, list[int]]
) -> None:
    before, given = (parse_config(SETS | {"train": train}, name="n") for train in (started, now))
    found = with_length(given, before, RunFolder(Path("run"), "n"))
    assert (found.train.epochs, found.train.exposures, [one.repeats for one in found.data.sets]) == expected
    assert with_length(given, found, RunFolder(Path("run"), "n")) == found


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({"epochs": 2, "exposures": 40}, ["has 3 epochs", "not shorten it to 2", "--set train.epochs=3"]),
        ({"epochs": 3, "exposures": 101}, ["take 6 epochs", "20 times", "train.exposures = 100", "lora.from_file"]),
    ],
)
def test_shortening_a_run_or_exceeding_five_epochs_is_refused(
    tmp_path: Path, train: dict[str, int], parts: list[str]
) -> None:
    folder = RunFolder(tmp_path / "run", "n")
    folder.path.mkdir()
    folder.create(dump_toml(parse_config(SETS | {"train": {"epochs": 3, "exposures": 60}}, name="n")))
    with pytest.raises(ConfigError) as caught:
        resumed_config(parse_config(SETS | {"train": train}, name="n"), folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
