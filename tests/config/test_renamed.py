"""Earlier names of options, through every way by which options come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import call

from sdlora.batch.jobs import read_jobs
from sdlora.config.schema import RunConfig
from sdlora.config.toml import (
    RENAMED,
    load_config,
    option_fields,
    options,
    renaming_note,
    toml_value,
    with_current_names,
)
from sdlora.errors import ConfigError, RenamedOptionWarning
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.recipe import load_settings
from sdlora.ui.settings.draft import Draft, read_draft, update_draft, write_draft
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs
from sdlora.ui.state.run_view import settings_of
from sdlora.ui.state.try_lora import LoraSampler

VALUES: dict[str, Any] = {
    "data.holdout": "builtin:zumi/holdout", "data.holdout_split": False, "lora.start": "orthogonal",
    "train.schedule": "cosine",
    "train.plus_ratio": 4.0, "file.tell_captions": True,
}  # fmt: skip


def toml_file(path: Path, name: str) -> Path:
    """A configuration with one option under its earlier name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"data.folder = 'builtin:zumi'\n{name} = {toml_value(VALUES[name])}\n", encoding="utf-8")
    return path


def from_toml(tmp_path: Path, name: str) -> RunConfig:
    return load_config(str(toml_file(tmp_path / "mine.toml", name)))


def from_override(tmp_path: Path, name: str) -> RunConfig:
    # A file that gives the option under its current name is overridden, too.
    file = tmp_path / "mine.toml"
    given = dict(options(RunConfig()))[RENAMED[name]]
    current = "" if given is None else f"{RENAMED[name]} = {toml_value(given)}\n"
    file.write_text(f"data.folder = 'builtin:zumi'\n{current}", encoding="utf-8")
    return load_config(str(file), [f"{name}={toml_value(VALUES[name])}"])


def from_jobs(tmp_path: Path, tables: str) -> RunConfig:
    file = tmp_path / "jobs.toml"
    file.write_text(f"[defaults]\nconfig = 'quickstart'\n{tables}", encoding="utf-8")
    (job,) = read_jobs(file)
    assert job.config is not None, job.fault
    return job.config


def from_job_set(tmp_path: Path, name: str) -> RunConfig:
    # What a job sets comes before what all of them set, whichever names they use.
    default = f"[defaults.set]\n{toml_value(RENAMED[name])} = 'overridden'\n"
    return from_jobs(tmp_path, f"{default}[[jobs]]\nset = {{ {toml_value(name)} = {toml_value(VALUES[name])} }}\n")


def from_job_defaults(tmp_path: Path, name: str) -> RunConfig:
    return from_jobs(tmp_path, f"[defaults.set]\n{toml_value(name)} = {toml_value(VALUES[name])}\n")


def from_sweep(tmp_path: Path, name: str) -> RunConfig:
    return from_jobs(tmp_path, f"[sweep]\n{toml_value(name)} = [{toml_value(VALUES[name])}]\n")


def from_sweep_list(tmp_path: Path, name: str) -> RunConfig:
    return from_jobs(tmp_path, f"[[sweep]]\n{name} = {toml_value(VALUES[name])}\n")


def from_run_folder(tmp_path: Path, name: str) -> RunConfig:
    studio = new_studio(tmp_path)
    toml_file(studio.run("mine") / "config.toml", name)
    return settings_of(studio, "mine")


WAYS = (
    from_toml, from_override, from_job_set, from_job_defaults, from_sweep, from_sweep_list, from_run_folder
)  # fmt: skip


def new_studio(tmp_path: Path) -> Studio:
    studio = Studio(tmp_path / "studio")
    studio.create()
    return studio


def test_every_renamed_option_has_a_current_name() -> None:
    assert VALUES.keys() == RENAMED.keys()
    assert set(RENAMED.values()) <= set(option_fields()) and not RENAMED.keys() & set(option_fields())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", RENAMED)
def test_earlier_name_is_read_with_a_warning(tmp_path: Path, name: str, way: Callable[[Path, str], RunConfig]) -> None:
    with pytest.warns(RenamedOptionWarning) as caught:
        config = way(tmp_path, name)
    assert dict(options(config))[RENAMED[name]] == VALUES[name]
    assert {str(warning.message) for warning in caught} == {renaming_note(name)}


@pytest.mark.parametrize("name", RENAMED)
def test_command_line_prints_one_plain_warning(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = toml_file(tmp_path / "mine.toml", name)
    override = f"{name}={toml_value(VALUES[name])}"
    code, out, err = call(capsys, "config", "show", str(file), "--set", override)
    assert (code, err) == (0, f"Warning: {renaming_note(name)}\n")
    assert f"{RENAMED[name].partition('.')[2]} = {toml_value(VALUES[name])}" in out


@pytest.mark.parametrize("name", RENAMED)
def test_draft_of_the_studio_is_kept_and_updated_once(tmp_path: Path, name: str) -> None:
    studio = new_studio(tmp_path)
    write_draft(studio, Draft(images="set", name="mine"))
    saved = json.loads(studio.draft.read_text(encoding="utf-8"))
    saved["values"] |= {name: VALUES[name], "seed": 7}
    studio.draft.write_text(json.dumps(saved), encoding="utf-8")
    draft = read_draft(studio)
    assert (draft.images, draft.value(RENAMED[name]), draft.value("seed")) == ("set", VALUES[name], 7)
    assert update_draft(studio) == [renaming_note(name)]
    assert (read_draft(studio), update_draft(studio)) == (draft, [])


@pytest.mark.filterwarnings("ignore::sdlora.errors.RenamedOptionWarning")
@pytest.mark.parametrize("name", RENAMED)
def test_settings_loaded_into_the_studio_show_the_warning(tmp_path: Path, name: str) -> None:
    studio = new_studio(tmp_path)
    context = Context(studio, Jobs(studio), LoraSampler())
    told = load_settings(context, str(toml_file(tmp_path / "mine.toml", name)))
    assert told.count(renaming_note(name)) == 1
    assert context.draft().value(RENAMED[name]) == VALUES[name]


@pytest.mark.parametrize("name", RENAMED)
def test_both_names_of_an_option_are_refused(name: str) -> None:
    section, _, key = name.partition(".")
    current = RENAMED[name].partition(".")[2]
    for settings in ({section: {key: 1, current: 2}}, {name: 1, RENAMED[name]: 2}):
        with pytest.warns(RenamedOptionWarning), pytest.raises(ConfigError, match=f"{name} and {RENAMED[name]}"):
            with_current_names(settings)
