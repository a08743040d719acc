"""A recipe on its way is kept, and comes out as the command line's own configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.studios import write_image

from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config, parse_config
from sdlora.errors import ConfigError, SdloraError
from sdlora.ui.pages.context import Context
from sdlora.ui.settings import form
from sdlora.ui.settings.draft import Draft, from_config, read_draft, write_draft
from sdlora.ui.settings.recipes import OWN, recipe
from sdlora.ui.state.folders import Studio

SETS = next(field for field in form.fields() if field.name == "data.sets")


def test_a_draft_is_found_again_as_it_was_left(studio: Studio) -> None:
    assert read_draft(studio) == Draft()
    draft = Draft(images="set", name="mine").with_answers("style", "thorough", "owner/name")
    draft = draft.with_values({"data.trigger": "zumi", "seed": 2**60})
    write_draft(studio, draft)
    assert read_draft(studio) == draft
    studio.draft.write_text('{"pictures": "set", "values": {"gone.option": 1}}', encoding="utf-8")
    assert read_draft(studio) == Draft(images="set")


def test_its_configuration_is_the_command_lines(studio: Studio, tmp_path: Path) -> None:
    write_image(studio.image_set("my set") / "a.png")
    draft = Draft(images="my set").with_values({"data.trigger": "zumi", "lora.rank": 3})
    config = draft.config(studio)
    assert (config.name, config.lora.rank, config.data.triggers) == ("my set", 3, ["zumi"])
    assert [one.folder for one in config.data.sets] == [str(studio.image_set("my set").resolve())]
    file = tmp_path / "any.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    again = from_config(load_config(str(file)), studio)
    assert again.images == "my set" and again.config(studio) == config


def test_answers_set_the_options_and_keep_the_rest() -> None:
    draft = Draft().with_values({"data.trigger": "zumi", "train.warmup_steps": 5})
    changed = draft.with_answers("object", "a first look", "owner/name")
    for name, value in recipe("object", "a first look", "owner/name").items():
        assert changed.value(name) == value
    assert (changed.trigger, changed.value("train.warmup_steps")) == ("zumi", 5)
    assert changed.with_values({"train.warmup_steps": 0}).values.keys() == changed.values.keys() - {
        "train.warmup_steps"
    }


@pytest.mark.parametrize("images", ["", "builtin:nothing", "nowhere/at all"])
def test_what_is_missing_is_told(studio: Studio, images: str) -> None:
    closed = Studio(studio.runs, any_folder=False)
    with pytest.raises(SdloraError):
        Draft(images=images).config(closed)


def test_a_base_elsewhere_is_not_read_over_the_network(studio: Studio, tiny_base: Path) -> None:
    draft = Draft(images="builtin:zumi").with_values({"base.path": str(tiny_base)})
    assert isinstance(draft.config(studio), RunConfig)
    with pytest.raises(ConfigError, match="over the network"):
        draft.config(Studio(studio.runs, any_folder=False))


def test_a_free_name_has_a_number(context: Context) -> None:
    (context.studio.runs / "zumi").mkdir()
    (context.studio.runs / "zumi-2").mkdir()
    assert [context.free_name(name) for name in ("zumi", "other")] == ["zumi-3", "other"]


def test_shipped_sets_are_not_changed(context: Context) -> None:
    for images in ("builtin:zumi", ""):
        with pytest.raises(SdloraError):
            context.editor(images).writable()
    assert context.editor("mine").writable() == context.studio.image_set("mine").resolve()
    assert context.sets() == ["builtin:blueprint", "builtin:zumi"]


def test_a_fault_of_the_studio_is_a_message_and_in_its_log(context: Context) -> None:
    def broken() -> str:
        raise ZeroDivisionError("no")

    told = context.attempt(broken)
    assert "ZeroDivisionError: no" in told and "studio.log" in told
    assert "Traceback" in (context.studio.runs / ".studio" / "studio.log").read_text(encoding="utf-8")
    assert "it worked" in context.attempt(lambda: "it worked")


def test_several_sets_are_kept_by_a_draft(studio: Studio, images: Path, others: Path) -> None:
    sets = [{"folder": str(images), "repeats": 2}, {"folder": str(others), "trigger": "mizu", "name": "more"}]
    config = parse_config({"data": {"sets": sets}}, name="both")
    write_draft(studio, from_config(config, studio))
    draft = read_draft(studio)
    assert (draft.images, draft.has_images, draft.config(studio)) == ("", True, config)
    assert draft.needs() is not None, "what it needs of memory depends on no image"
    shown = {field.name: form.shown(field, draft.value(field.name)) for field in form.fields()}
    assert form.entered(SETS, shown["data.sets"]) == draft.value("data.sets")
    with pytest.raises(ConfigError, match=r"data\.folder and data\.sets"):
        replace(draft, images="set").config(studio)
    with pytest.raises(ConfigError, match=str(images)):
        draft.config(Studio(studio.runs, any_folder=False))


OLD = {
    "pictures": "set", "name": "mine", "subject": "style", "length": "thorough", "fitted": [],
    "values": {"base.path": "owner/name", "lora.rank": 16, "lora.alpha": 16.0, "train.epochs": 5, "data.repeats": 50,
               "lora.targets": ["cross_attention", "self_attention"], "data.trigger": "zumi"},
}  # fmt: skip


def test_a_draft_of_an_earlier_version_is_kept(studio: Studio) -> None:
    studio.draft.write_text(json.dumps(OLD), encoding="utf-8")
    draft = read_draft(studio)
    assert (draft.images, draft.name, draft.subject, draft.values) == ("set", "mine", "style", OLD["values"])
    assert draft.length == OWN
    assert draft.with_length("as usual").value("train.exposures") == 100


def test_what_belongs_to_a_set_goes_with_it_and_comes_back() -> None:
    own = {
        "data.trigger": "zumi", "data.validation_folder": "more", "data.class_words": ["a cat"],
        "train.preservation_weight": 1.0, "preview.prompts": ["zumi at night"], "data.masks": "alpha",
        "loss.mask_floor": 0.2,
    }  # fmt: skip
    first = Draft(images="first", name="first-2").with_values(own | {"seed": 3})
    second = first.with_images("second")
    assert (second.images, second.name, second.value("seed")) == ("second", "", 3)
    assert own.keys().isdisjoint(second.values)
    assert second.with_values({"data.trigger": "mizu"}).with_images("first").with_images("second").trigger == "mizu"
    assert second.with_images("first").values == first.values
    # Several sets are one choice as well; the first choice of all takes over what was typed before it.
    several = Draft().with_values({"data.sets": [{"folder": "a"}, {"folder": "b"}], "data.masks": "file"})
    assert several.with_images("set").values == Draft().values
    assert Draft().with_values({"data.trigger": "zumi"}).with_images("set").trigger == "zumi"


def test_loaded_settings_that_are_no_recipe_are_own_settings(studio: Studio) -> None:
    config = parse_config({"data": {"folder": "x", "repeats": 3}, "lora": {"rank": 5}}, name="a")
    draft = from_config(config, studio)
    assert (draft.subject, draft.length) == (OWN, OWN)
    moved = draft.with_answers(OWN, OWN, "owner/name")
    assert (moved.value("lora.rank"), moved.base, moved.subject) == (5, "owner/name", OWN)


def test_settings_for_another_family_name_what_to_press(studio: Studio, tiny_base: Path) -> None:
    config = parse_config({"base": {"family": "sdxl"}, "data": {"folder": "builtin:zumi"}}, name="a")
    draft = from_config(config, studio).with_values({"base.path": str(tiny_base)})
    with pytest.raises(ConfigError, match="Choose what it should learn"):
        draft.config(studio)
    draft.with_answers("style", "as usual", str(tiny_base)).config(studio)
