"""What holds for every importer's table: covered by a fixture, complete, safe with any value, in the documentation."""

from __future__ import annotations

import copy
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.imports import FIXTURES, TABLES

from sdlora.config.imports import kohya_gui
from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Source, Status, translate
from sdlora.config.toml import option_fields, parse_config
from sdlora.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "importing.md"
FORMS = {
    "sd_scripts": ["sd_scripts.toml", "sd_scripts_dataset.toml"],
    "kohya_ss": ["kohya_ss.json"],
    "onetrainer": ["onetrainer.json"],
    "ai_toolkit": ["ai_toolkit.yaml"],
    "diffusers": ["diffusers_images.txt", "diffusers_dreambooth.txt", "diffusers_dreambooth_sd.txt"],
}
# Switches that are on by being there, and settings that another one of the fixture excludes.
NOT_IN_A_FIXTURE = {
    "diffusers": {
        "random_flip", "do_edm_style_training", "dataset_name", "dataset_config_name", "max_train_samples",
        "resume_from_checkpoint", "adam_weight_decay_text_encoder", "prodigy_beta3", "tokenizer_name",
        "pretrained_vae_model_name_or_path", "class_labels_conditioning", "validation_images",
    },
    "onetrainer": {"concepts", "samples"},
    "ai_toolkit": {
        "process.network.network_kwargs", "process.train.optimizer_params", "process.train.lr_scheduler_params",
    },
}  # fmt: skip


def launch(key: str) -> bool:
    return key.startswith("launch.") and key not in ("launch.mixed_precision", "launch.num_processes")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "kohya_ss"])
def test_the_fixtures_hold_every_key_of_the_table(form: str) -> None:
    found = {fate.key for name in FORMS[form] for fate in import_file(FIXTURES / name).fates if fate.given}
    of_table = {key for key in TABLES[form] if not launch(key) and not key.startswith("optimizer_args.")}
    assert of_table - found == NOT_IN_A_FIXTURE.get(form, set())


def test_the_gui_fixture_holds_every_key_of_its_own() -> None:
    document = json.loads((FIXTURES / "kohya_ss.json").read_text(encoding="utf-8"))
    assert {*kohya_gui.OWN, *kohya_gui.NAMES} <= set(document)


@pytest.mark.parametrize("name", [name for names in FORMS.values() for name in names])
def test_every_key_of_a_fixture_is_accounted_for_and_the_result_is_valid(name: str) -> None:
    imported = import_file(FIXTURES / name)
    assert not imported.open_keys
    assert parse_config(imported.document, name="imported")
    for fate in imported.fates:
        assert fate.options or fate.reason, fate.key
        assert set(fate.options) <= set(option_fields()), fate.key


@pytest.mark.parametrize("form", TABLES)
def test_what_is_refused_is_refused_when_it_is_on(form: str) -> None:
    rules = {key: rule for key, rule in TABLES[form].items() if rule.summary.startswith("refused unless")}
    assert rules
    for key, rule in rules.items():
        for value in ("something", 7, 0.37, ["something"]):
            (fate,) = translate(Source(form, {key: value}), {key: rule})
            assert fate.status is Status.REFUSED and fate.reason, key
        (fate,) = translate(Source(form, {key: None}), {key: rule})
        assert fate.status is Status.DROPPED, key


@pytest.mark.parametrize("form", TABLES)
def test_every_key_that_is_read_with_another_names_one_of_the_table(form: str) -> None:
    for rule in TABLES[form].values():
        assert rule.follows is None or rule.follows in TABLES[form]


def _changed(value: Any, choose: random.Random) -> Any:
    """The value with some of what is in it replaced by something that does not belong there."""
    strange = [None, "", "x", -1, 0, 1e30, True, [], {}, ["a", 1], {"a": {"b": 1}}, "1,2", float("nan"), "\ud800"]
    if choose.random() < 0.15:
        return choose.choice(strange)
    if isinstance(value, dict):
        return {key: _changed(entry, choose) for key, entry in value.items()}
    if isinstance(value, list):
        return [_changed(entry, choose) for entry in value]
    return value


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "name", ["kohya_ss.json", "onetrainer.json", "ai_toolkit.yaml", "sd_scripts.toml", "sd_scripts_dataset.toml"]
)
def test_any_value_is_translated_or_refused_and_never_an_internal_error(folder: Path, name: str, seed: int) -> None:
    parse = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}[name.partition(".")[2]]
    choose = random.Random(seed)
    document = _changed(copy.deepcopy(parse((FIXTURES / name).read_text(encoding="utf-8"))), choose)
    file = folder / "changed.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    try:
        imported = import_file(file)
    except ConfigError as error:
        assert str(error)
        return
    assert parse_config(imported.document, name="imported")


def table_of(form: str) -> str:
    """The documentation's table of a form: keys with the same outcome in one row, long rows cut."""
    rules = TABLES[form]
    if form == "kohya_ss":
        rules = {key: rule for key, rule in rules.items() if key in kohya_gui.OWN}
    rows: dict[str, list[str]] = {}
    for key, rule in rules.items():
        rows.setdefault(rule.summary, []).append(f"`{key}`")
    for keys in rows.values():
        if len(keys) > 9:
            keys[6:] = [f"and {len(keys) - 6} more"]
    order = ("`", "the same", "read with", "refused", "dropped")
    rows = dict(
        sorted(rows.items(), key=lambda row: next(i for i, word in enumerate(order) if row[0].startswith(word)))
    )
    return "\n".join(
        ["| Key | Becomes |", "|---|---|", *(f"| {', '.join(keys)} | {text} |" for text, keys in rows.items())]
    )


@pytest.mark.parametrize("form", TABLES)
def test_the_documentation_has_the_table_as_it_is(form: str) -> None:
    assert table_of(form) in PAGE.read_text(encoding="utf-8")
