"""The kinds of rules, and how a table is applied."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.imports import fate_of, option

from sdlora.config.imports.rules import (
    Fate,
    Imported,
    Outcome,
    Source,
    Status,
    arguments,
    compute,
    drop,
    dropped,
    flag,
    flatten,
    keys,
    number,
    pairs,
    part_of,
    refuse,
    refused,
    rename,
    switch,
    table,
    text,
    translate,
    translated,
    whole,
)
from sdlora.config.imports.settle import settle

RULES = table(
    {
        "rank": rename("lora.rank", whole),
        keys("log save"): drop("not needed"),
        "flip": refuse("no flips"),
        "network": compute(lambda value, source: refused("no", {"lora.alpha": 2}), "?"),
        "v": switch({"base.prediction_type": "v_prediction"}),
        "alpha": part_of("rank"),
        "lonely": part_of("absent"),
        keys("path keep prompt", "sets"): rename("data.keep_tags", whole),
        "sets.name": rename("preview.negative_prompt", text, "first"),
        "sets.all": compute(lambda value, source: translated({"preview.seeds": value}), "?", "all"),
    }
)


def run(values: dict[str, Any], rows: list[dict[str, Any]] | None = None, **defaults: Any) -> Imported:
    source = Source("test", values, rows={"sets": rows or []}, defaults=defaults)
    return settle(source, translate(source, RULES))


def test_every_kind_of_rule_has_its_outcome() -> None:
    found = run({"rank": "4", "log": 1, "flip": True, "network": "x", "v": True, "alpha": 3, "lonely": 1, "rnak": 2})
    outcomes = {fate.key: (fate.status.value, dict(fate.options)) for fate in found.fates}
    assert outcomes == {
        "rank": ("translated", {"lora.rank": 4}),
        "log": ("dropped", {}),
        "flip": ("refused", {}),
        "network": ("refused", {"lora.alpha": 2}),
        "v": ("translated", {"base.prediction_type": "v_prediction"}),
        "alpha": ("translated", {}),
        "lonely": ("dropped", {}),
        "rnak": ("unknown", {}),
        "images": ("refused", {"data.folder": "images"}),
    }
    assert found.open_keys == ["flip", "network", "rnak", "images"]
    assert option(found, "lora.alpha") == 2, "what a refused key translates is kept"
    assert "did you mean rank?" in run({"ranks": 2}).fates[0].reason


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_empty_values_are_not_set(value: Any) -> None:
    assert fate_of(run({"rank": value}), "rank").reason == "not set"
    assert option(run({"rank": value}, rank=7), "lora.rank") == 7


@pytest.mark.parametrize("value", [False, 0, "0", "none"])
def test_switched_off_settings_are_not_refused(value: Any) -> None:
    assert fate_of(run({"flip": value}), "flip").status is Status.DROPPED


def test_a_default_is_reported_only_if_it_matters() -> None:
    found = run({}, rank=3, log=1)
    assert [(fate.key, fate.given) for fate in found.fates] == [("rank", False), ("images", False)]


def test_values_that_cannot_be_read_are_refused() -> None:
    assert "'four' is not a number" in fate_of(run({"rank": "four"}), "rank").reason


def test_rows_must_agree_unless_the_rule_takes_them_all() -> None:
    assert option(run({}, [{"keep": 1}, {"keep": 1}]), "data.keep_tags") == 1
    assert fate_of(run({}, [{"keep": 1}, {"keep": 2}]), "sets.keep").status is Status.REFUSED
    assert fate_of(run({}, [{"keep": 1}, {}]), "sets.keep").status is Status.REFUSED
    assert option(run({}, [{"keep": 1}, {}], **{"sets.keep": 1}), "data.keep_tags") == 1
    assert option(run({}, [{"name": "a"}, {"name": "b"}]), "preview.negative_prompt") == "a"
    assert option(run({}, [{"all": 1}, {"all": 2}]), "preview.seeds") == [1, 2]


def test_a_contradiction_is_refused() -> None:
    found = run({"rank": 4}, [{"keep": 1, "path": 2}])
    assert fate_of(found, "sets.keep").status is Status.REFUSED
    assert option(found, "data.keep_tags") == 2


def test_what_the_schema_refuses_is_refused_with_its_reason() -> None:
    found = run({"rank": 4000, "v": True})
    fate = fate_of(found, "rank")
    assert fate.status is Status.REFUSED and "256" in fate.reason
    assert option(found, "base.prediction_type") == "v_prediction", "the rest is kept"


def test_decided_keys_go_before_their_rules() -> None:
    source = Source("test", {"rank": 4}, decided={"rank": dropped("decided"), "other": dropped("too")})
    assert [fate.reason for fate in translate(source, RULES)] == ["decided", "too"]


def test_labels_name_keys_as_the_file_does() -> None:
    source = Source("test", {"rank": 4, "alpha": 2}, labels={"rank": "dim"})
    assert [(fate.key, fate.reason) for fate in translate(source, RULES)] == [("dim", ""), ("alpha", "see dim")]


@pytest.mark.parametrize(
    ("convert", "value", "expected"),
    [
        (number, "1e-4", 1e-4), (number, "3", 3), (number, 2.0, 2), (number, 0.5, 0.5), (whole, "12", 12),
        (flag, "true", True), (flag, 0, False), (flag, None, False), (text, 5, "5"),
        (pairs, ["a=1", "b=2=3"], {"a": "1", "b": "2=3"}), (pairs, '"a=1" b="x y"', {"a": "1", "b": "x y"}),
    ],
)  # fmt: skip
def test_conversions(convert: Any, value: Any, expected: Any) -> None:
    assert convert(value) == expected


@pytest.mark.parametrize(
    ("convert", "value"),
    [
        (number, "x"), (number, True), (number, "nan"), (number, float("inf")), (number, []), (whole, 1.5),
        (flag, "maybe"), (flag, 2), (text, []), (text, {}), (pairs, ["a"]), (pairs, '"a=1'),
    ],
)  # fmt: skip
def test_conversions_refuse_what_they_cannot_read(convert: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        convert(value)


def test_arguments_are_switches_values_and_lists() -> None:
    words = ["accelerate", "--flag", "--rank=4", "--betas", "0.9", "0.99", "--name", "x=y"]
    assert arguments(words) == {"flag": True, "rank": "4", "betas": ["0.9", "0.99"], "name": "x=y"}


def test_flatten_stops_at_opaque_and_empty_tables() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}, "e": {}}}, ["a.c"]) == {"a.b": 1, "a.c": {"d": 2}, "a.e": {}}


def test_outcomes_are_values() -> None:
    assert refused("no") == Outcome(Status.REFUSED, {}, "no")
    assert Fate("a", 1, Status.DROPPED, {}, "") == Fate("a", 1, Status.DROPPED, {}, "")
