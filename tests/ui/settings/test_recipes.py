"""Recipes are the shipped presets: the same settings as by the command line, for every family and subject."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studios import write_base, write_image

from sdlora.config.exposures import FEW, MANY
from sdlora.config.toml import load_config, options
from sdlora.ui.pages.more import more_fields
from sdlora.ui.settings import draft as drafts
from sdlora.ui.settings import form
from sdlora.ui.settings.draft import Draft, from_config
from sdlora.ui.settings.recipes import LENGTHS, OWN, SUBJECTS, recipe
from sdlora.ui.state.folders import Studio

FAMILIES = {
    "sd15": ("base", "sd1", "epsilon"),
    "sdxl": ("base", "sdxl", "epsilon"),
    "illustrious": ("waiNSFWIllustrious_v140", "sdxl", "epsilon"),
    "noobai-v": ("base", "sdxl", "v_prediction"),
    "z-image": ("base", "z-image", ""),
    "flux2-klein": ("base", "flux2-klein-4b", ""),
}
"""The beginning of presets' names: a base model's folder, its family and its prediction type."""


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name, family, prediction_type = FAMILIES[request.param]
    return str(write_base(tmp_path / name, family, prediction_type))


@pytest.fixture(autouse=True)
def with_plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "estimate", lambda _: None)


@pytest.mark.parametrize(("family", "base"), [(f, f) for f in FAMILIES], indirect=["base"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_recipe_is_the_command_lines_preset(family: str, base: str, subject: str, studio: Studio) -> None:
    folder = write_image(studio.image_set("set") / "a.png").parent.resolve()
    # By way of other answers, which leave nothing behind.
    draft = Draft(images="set", name="x").with_answers("style", "thorough", "owner/name")
    draft = draft.with_answers("object", "a first look", base).with_answers(subject, "as usual", base)
    wanted = load_config(f"{family}-{subject}", [f"base.path={base}", f"data.folder={folder}", "name=x"])
    assert draft.config(studio) == wanted
    assert dict(options(draft.config(studio))) == dict(options(wanted))
    assert draft.preset == f"{family}-{subject}"
    # And through the page, and back.
    shown = {field.name: form.shown(field, draft.value(field.name)) for field in more_fields()}
    entered = {field.name: form.entered(field, shown[field.name]) for field in more_fields()}
    assert draft.with_values(entered) == draft
    assert {change.by for change in draft.changes()} <= {draft.preset, "as usual"}
    again = from_config(wanted, studio)
    assert (again.subject, again.length, again.values) == (subject, "as usual", draft.values)


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_lengths_are_exposures_in_relation_to_the_presets(base: str, subject: str) -> None:
    lengths = [Draft().with_answers(subject, length, base) for length in LENGTHS]
    exposures = [draft.value("train.exposures") for draft in lengths]
    assert FEW <= exposures[0] < exposures[1] < exposures[2] < MANY
    for draft, length in zip(lengths, LENGTHS, strict=True):
        assert draft.length == length
        assert draft.value("data.repeats") == round(draft.value("train.exposures") / draft.value("train.epochs"))
        assert draft == lengths[0].with_length(length)


def test_the_built_in_base_keeps_its_own() -> None:
    for subject in SUBJECTS:
        values = recipe(subject, "as usual", "pocket")
        assert (values["train.epochs"], values["data.repeats"], values["lora.rank"]) == (4, 36, 16)
        assert (values["train.learning_rate"], values["train.exposures"]) == (3e-3, None)
    away = Draft().with_answers("object", "as usual", "owner/name")
    assert away.with_answers("character", "as usual", "pocket") == Draft()


def test_epochs_and_exposures_of_every_length_are_frozen() -> None:
    def of_length(base: str, option: str) -> list[tuple[int, int]]:
        recipes = [recipe("style", length, base) for length in LENGTHS]
        return [(values["train.epochs"], values[option]) for values in recipes]

    assert of_length("pocket", "data.repeats") == [(2, 12), (4, 36), (5, 50)]
    assert of_length("owner/name", "train.exposures") == [(2, 40), (4, 100), (5, 150)]


def test_an_unknown_base_has_the_schemas_defaults_and_enough_exposures() -> None:
    draft = Draft().with_answers("style", "as usual", "owner/name")
    assert draft.values == {"base.path": "owner/name", "train.exposures": 100}
    assert (draft.preset, draft.value("data.repeats")) == (None, 25)


def test_own_settings_are_told_from_recipes() -> None:
    draft = Draft()
    assert draft.with_value("train.epochs", 3).length == OWN
    assert draft.with_value("lora.rank", 3).length == "as usual"
    away = draft.with_answers("style", "as usual", "owner/name").with_value("train.exposures", 99)
    assert (away.length, away.with_length("thorough").length) == (OWN, "thorough")
    kept = away.with_answers("object", OWN, "owner/name")
    assert (kept.length, kept.value("train.exposures")) == (OWN, 99)


def test_repeats_follow_from_exposures_until_they_are_set() -> None:
    draft = Draft().with_answers("style", "as usual", "owner/name")
    shorter = draft.with_value("train.epochs", 2)
    assert shorter.value("data.repeats") == 50
    assert shorter.with_value("data.repeats", 50) == shorter, "shown and not touched"
    own = shorter.with_value("data.repeats", 7)
    assert (own.value("data.repeats"), own.value("train.exposures")) == (7, None)


@pytest.mark.parametrize("base", ["illustrious"], indirect=True)
def test_own_prompts_stay_and_those_of_a_preset_go(base: str) -> None:
    anime = Draft().with_answers("style", "as usual", base)
    assert "{trigger}" in anime.value("preview.prompts")[0]
    assert anime.with_answers("style", "as usual", "pocket").value("preview.prompts") == []
    own = anime.with_value("preview.prompts", ["zumi"])
    assert own.with_answers("style", "as usual", "pocket").value("preview.prompts") == ["zumi"]


@pytest.mark.parametrize(("subject", "length"), [(s, n) for s in SUBJECTS for n in LENGTHS])
@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_every_recipe_is_valid_and_shown_under_more(subject: str, length: str, base: str) -> None:
    for path in (base, "pocket", "owner/name"):
        values = recipe(subject, length, path)
        form.make_config({"data.folder": "x", **Draft().with_answers(subject, length, path).values}, "a")
        assert values.keys() - {"base.path"} <= {field.name for field in more_fields()}


def test_changes_say_what_has_set_them() -> None:
    draft = Draft().with_answers("style", "a first look", "pocket")
    draft = draft.with_values({"data.trigger": "zumi", "seed": 3, "lora.rank": 4})
    by = {change.name: change.by for change in draft.changes()}
    assert (by["seed"], by["lora.rank"], by["lora.alpha"], by["train.epochs"]) == ("", "", "quickstart", "a first look")
    assert "data.trigger" not in by
