"""Exposures become repeats, and too few or too many are said."""

from __future__ import annotations

from typing import Any

import pytest

from sdlora.config.exposures import exposures_warning
from sdlora.config.toml import dump_toml, parse_config
from sdlora.errors import ConfigError


def parsed(data: dict[str, Any], **train: Any) -> Any:
    return parse_config({"data": data, "train": train}, name="x")


@pytest.mark.parametrize(
    ("exposures", "epochs", "repeats"), [(100, 4, 25), (100, 3, 33), (100, 5, 20), (2, 5, 1), (7, 2, 4)]
)
def test_exposures_are_spread_over_the_epochs(exposures: int, epochs: int, repeats: int) -> None:
    config = parsed({"folder": "d"}, exposures=exposures, epochs=epochs)
    assert [one.repeats for one in config.data.sets] == [repeats]


def test_default_epochs_count() -> None:
    assert parsed({"folder": "d"}, exposures=80).data.sets[0].repeats == 20


def test_set_with_most_repeats_is_seen_that_often_and_others_in_proportion() -> None:
    sets = [{"folder": "a", "repeats": 10}, {"folder": "b", "repeats": 5}, {"folder": "c"}]
    config = parsed({"sets": sets}, exposures=120, epochs=4)
    assert [one.repeats for one in config.data.sets] == [30, 15, 3]


def test_written_configuration_reads_back_as_the_same() -> None:
    import tomllib

    for data in ({"folder": "d"}, {"sets": [{"folder": "a", "repeats": 3}, {"folder": "b", "repeats": 2}]}):
        config = parsed(data, exposures=100, epochs=3)
        assert parse_config(tomllib.loads(dump_toml(config)), name="x") == config


def test_other_repeats_are_refused_with_the_exposures_they_mean() -> None:
    with pytest.raises(ConfigError, match=r"data\.repeats = 10.*train\.exposures = 100.*train\.exposures = 40"):
        parsed({"folder": "d", "repeats": 10}, exposures=100)


@pytest.mark.parametrize("value", [0, -1, "many", 5001])
def test_impossible_exposures_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"train\.exposures"):
        parsed({"folder": "d"}, exposures=value)


@pytest.mark.parametrize(
    ("fewest", "most", "facts"),
    [(4, 4, ("4 times", "100")), (240, 240, ("240 times", "200")), (5, 100, ("5 times", "100 times"))],
)
def test_unusual_exposures_are_said(fewest: int, most: int, facts: tuple[str, ...]) -> None:
    found = exposures_warning(fewest, most)
    assert found is not None
    assert all(fact in found for fact in facts)


@pytest.mark.parametrize("count", [20, 100, 200])
def test_usual_exposures_need_no_words(count: int) -> None:
    assert exposures_warning(count, count) is None
