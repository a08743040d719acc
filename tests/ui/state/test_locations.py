"""What a recipe names is held to the studio's folder and to its stores, whatever the option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdlora.config.schema import RunConfig
from sdlora.config.toml import locations, option_fields
from sdlora.errors import ConfigError
from sdlora.ui.pages import recipe as recipe_form
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.recipe import load_settings
from sdlora.ui.settings.draft import Draft
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.locations import check_locations

ABROAD = [
    "webhdfs://127.0.0.1:8080/x", "http://127.0.0.1/x", "file:///etc", "s3://other/set", "s3://bucketed/set",
    "s3://bucket/../other", "s3://bucket/%2e%2e/other", "s3://bucket/a::http://127.0.0.1/x", "FTP://127.0.0.1/x",
    "simplecache::ftp://127.0.0.1/x", "zip://*::ftp://me:hunter2@127.0.0.1/x",
]  # fmt: skip
ELSEWHERE = ["/etc", "~", "~root/x", "../x", "/etc/passwd", "a\0b", "x/" * 3000, "builtin:zumi/../../../etc"]


def naming(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A recipe for every option that names a location, which names this one."""
    for name in option_fields():
        section, _, key = name.rpartition(".")
        for value in (text, [{"folder": text}], [{"file": text, "weight": 1.0}]):
            document = {section: {key: value}} if section else {key: value}
            if list(locations(document)):
                yield name, document


def test_every_option_that_names_a_location_is_found() -> None:
    found = {name for name, _ in naming("x")}
    assert found == {
        "base.path", "base.components", "base.text_encoder", "base.vae", "base.merge", "base.training_adapter",
        "cache.dir", "data.folder", "data.sets",
        "data.validation_folder", "data.preservation_folder", "lora.from_file", "preview.base",
    }  # fmt: skip
    words = {"folder", "dir", "path", "file", "from_file", "merge", "sets"}
    for name in option_fields():
        key = name.rpartition(".")[2]
        assert name in found or not (key in words or key.endswith(("_folder", "_dir", "_path", "_file"))), name


@pytest.mark.parametrize("text", [*ABROAD, *ELSEWHERE], ids=lambda text: text[:20])
def test_location_elsewhere_is_refused_over_the_network(text: str, tmp_path: Path) -> None:
    closed = Studio(tmp_path / "runs", any_folder=False, stores=("s3://bucket",))
    closed.create()
    for name, document in naming(text):
        with pytest.raises(ConfigError) as caught:
            check_locations(closed, document)
        assert "hunter2" not in str(caught.value), name


@pytest.mark.parametrize("text", ABROAD)
def test_url_is_refused_on_the_machine_itself_unless_its_store_is_named(text: str, studio: Studio) -> None:
    for name, document in naming(text):
        with pytest.raises(ConfigError):
            check_locations(studio, document)
        assert name
    opened = Studio(studio.runs, stores=("s3://bucket", "webhdfs://127.0.0.1:8080/x"))
    for url in ("s3://bucket", "s3://bucket/set", "webhdfs://127.0.0.1:8080/x/y"):
        check_locations(opened, {"data": {"folder": url}})
        assert Draft(images=url, name="x").config(opened).data.folders == [url]
    with pytest.raises(ConfigError, match="--store"):
        Draft(images="s3://bucket/set", name="x").config(studio)


def test_own_folders_shipped_sets_and_hub_ids_are_allowed(tmp_path: Path) -> None:
    closed = Studio(tmp_path / "runs", any_folder=False)
    closed.create()
    own = str(closed.sets / "mine")
    data = {"folder": own, "validation_folder": "builtin:zumi/holdout", "sets": [{"folder": own}]}
    for path in ("pocket", "owner/name", "sd-legacy/stable-diffusion-v1-5", str(closed.runs / "bases" / "x")):
        check_locations(closed, {"base": {"path": path}, "data": data})
    check_locations(closed, RunConfig().model_dump())


def test_recipe_is_refused_where_it_is_entered(context: Context, tmp_path: Path) -> None:
    closed = Context(Studio(context.studio.runs, any_folder=False), context.jobs, context.sampler)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    fields = [field.name for field in recipe_form.more_fields()]
    values = recipe_form.fill(context, Draft())
    for name in ("lora.from_file", "cache.dir", "data.validation_folder", "data.preservation_folder"):
        changed = [*values]
        changed[len(values) - len(fields) + fields.index(name)] = str(tmp_path / "secret.safetensors")
        with pytest.raises(ConfigError, match="over the network"):
            recipe_form.read(closed, changed)


@pytest.mark.parametrize("extends", ["../secret", "{folder}/secret.toml", "secret.toml"])
def test_uploaded_settings_extend_no_file_of_the_machine(context: Context, tmp_path: Path, extends: str) -> None:
    (tmp_path / "secret.toml").write_text("seed = 31337\n[data]\nfolder = 'builtin:zumi'\n")
    upload = tmp_path / "uploads" / "mine.toml"
    upload.parent.mkdir()
    (upload.parent / "secret.toml").write_text("seed = 31337\n[data]\nfolder = 'builtin:zumi'\n")
    upload.write_text(f"extends = {extends.format(folder=tmp_path)!r}\n")
    with pytest.raises(ConfigError, match="bundled"):
        load_settings(context, str(upload))
    upload.write_text("extends = 'quickstart'\n")
    load_settings(context, str(upload))


def test_uploaded_settings_do_not_list_folders(context: Context, tmp_path: Path) -> None:
    closed = Context(Studio(context.studio.runs, any_folder=False), context.jobs, context.sampler)
    (tmp_path / "private" / "3_secretname").mkdir(parents=True)
    upload = tmp_path / "mine.toml"
    upload.write_text(f"[data]\nfolder = '{tmp_path}/private'\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(closed, str(upload))
    assert "secretname" not in str(caught.value)
