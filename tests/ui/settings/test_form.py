"""The form is the schema: every option, with its own words and limits, and back again unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config, option_fields, options, parse_config
from sdlora.errors import ConfigError
from sdlora.ui.settings import form

FIELDS = {field.name: field for field in form.fields()}


def test_every_option_is_a_field_with_the_schemas_words() -> None:
    assert list(FIELDS) == list(option_fields())
    definitions = RunConfig.model_json_schema()
    for name, field in FIELDS.items():
        section, _, key = name.rpartition(".")
        properties = definitions["properties"]
        if section:
            properties = definitions["$defs"][properties[section]["$ref"].rpartition("/")[2]]["properties"]
        assert field.help == properties[key]["description"]
        found = {**properties[key], **next(iter(properties[key].get("anyOf", [])), {})}
        assert field.minimum == found.get("minimum", found.get("exclusiveMinimum"))
        assert field.maximum == found.get("maximum", found.get("exclusiveMaximum"))
        if not field.open:
            assert set(field.choices) == set(found.get("enum") or found.get("items", {}).get("enum") or ())


@pytest.mark.parametrize("name", option_fields())
def test_what_is_shown_and_not_touched_comes_back(name: str) -> None:
    default = dict(options(RunConfig()))[name]
    assert form.entered(FIELDS[name], form.shown(FIELDS[name], default)) == default


VALUES: dict[str, Any] = {
    "seed": 2**60, "base.variant": "fp16", "data.class_words": ["a red cat", "house"], "data.trigger": 'zu"mi',
    "lora.target_ranks": {"cross_attention": 4}, "lora.targets": ["cross_attention", "mlp"],
    "lora.target_alphas": {"cross_attention": 0.5}, "lora.timestep_rank_min": 2, "train.learning_rate": 1e-5,
    "train.preservation_weight": 0.5, "preview.seeds": [3, 2**60], "preview.prompts": [
        "zumi, on the moon",
        {"text": "b", "negative_prompt": "", "seeds": [1, 2**60], "num_steps": 25, "guidance": 5.5, "sampler": "unipc",
         "width_px": 832, "height_px": 1216, "lora_scale": 0.1},
    ],
    "lora.rslora": True, "loss.weighting": "p2", "loss.gamma": 2.0,
}  # fmt: skip


def test_a_prompt_with_settings_of_its_own_is_a_line_of_kohyas() -> None:
    field = FIELDS["preview.prompts"]
    line = form.shown(field, ["a", {"text": "b {trigger}", "width_px": 832, "lora_scale": 0.5}])
    assert (field.kind, line) == ("lines", "a\nb {trigger} --w 832 --am 0.5")
    with pytest.raises(ConfigError, match=r"unknown flags --ar in 'b --w 64 --ar 5'.*--am \(lora_scale\)"):
        form.make_config({"data.folder": "x", "preview.prompts": form.entered(field, "b --w 64 --ar 5")}, "mine")


def test_a_file_of_the_command_line_comes_through_the_form_unchanged(tmp_path: Any) -> None:
    file = tmp_path / "mine.toml"
    folder = {"data.folder": "builtin:zumi", "name": "mine"}
    file.write_text(dump_toml(parse_config(form.to_document(VALUES | folder), name="mine")), encoding="utf-8")
    config = load_config(str(file))
    assert dict(options(config)) | VALUES == dict(options(config))
    # Through the browser, which knows JSON alone.
    browser = {
        name: json.loads(json.dumps(form.shown(field, dict(options(config))[name]))) for name, field in FIELDS.items()
    }
    entered = {name: form.entered(FIELDS[name], value) for name, value in browser.items()}
    assert form.make_config(entered, "mine") == config


def test_faults_are_the_schemas_and_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        form.make_config({"data.folder": "x", "train.epochs": 9, "lora.rank": 0}, "a")
    assert "train.epochs" in str(error.value) and "lora.rank" in str(error.value)
    with pytest.raises(ConfigError, match=r"lora.target_ranks.*Write it like this"):
        form.entered(FIELDS["lora.target_ranks"], "mlp: 4")


@pytest.mark.parametrize("text", ["[" * 100_000, "a." * 20_000 + "b = 1", "x = " + "9" * 5_000])
def test_text_that_no_other_reader_takes_is_refused_as_well(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^lora\.target_ranks: .{1,900}$"):
        form.entered(FIELDS["lora.target_ranks"], text)


def test_a_blank_field_is_the_default_or_none() -> None:
    for name in ("train.epochs", "data.resolution_px", "data.trigger", "train.device", "lora.target_ranks"):
        assert form.entered(FIELDS[name], "") == FIELDS[name].default


@pytest.mark.parametrize(
    ("text", "value"),
    [("0,001", 0.001), ("0,0005", 0.0005), (" 1e-4 ", 1e-4), ("1E-4", 1e-4), (".5", 0.5), (",5", 0.5), ("2", 2.0)],
)
def test_decimal_commas_are_read(text: str, value: float) -> None:
    assert form.entered(FIELDS["train.learning_rate"], text) == value


@pytest.mark.parametrize("text", ["1.000,5", "1,000.5", "1 000", "fast", "0,00,1", "1e", "--1", "nan", "١"])
def test_what_is_no_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.learning_rate: "):
        form.entered(FIELDS["train.learning_rate"], text)


@pytest.mark.parametrize("text", ["1,5", "1.000", "1,000", "2.0", "two"])
def test_what_is_no_whole_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: "):
        form.entered(FIELDS["train.epochs"], text)


@pytest.mark.parametrize(
    ("value", "text"), [(1e-5, "0.00001"), (3e-3, "0.003"), (8.0, "8"), (100.0, "100"), (2.5e-4, "0.00025")]
)
def test_numbers_are_shown_as_people_write_them(value: float, text: str) -> None:
    field = FIELDS["train.learning_rate"]
    assert form.shown(field, value) == text and form.entered(field, text) == value


def test_sections_are_told() -> None:
    assert form.sections().keys() == {field.section for field in FIELDS.values()} == form.TITLES.keys()


def test_no_two_options_have_the_same_name_in_a_group() -> None:
    names = [(field.section, field.label) for field in FIELDS.values()]
    assert len(set(names)) == len(names)
