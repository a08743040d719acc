"""Which trainer a file comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.imports import FIXTURES, option

from sdlora.config.imports.detect import MAX_BYTES, import_file
from sdlora.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("ai_toolkit.yaml", "ai-toolkit"),
        ("diffusers_images.txt", "diffusers' script train_text_to_image_lora_sdxl.py"),
        ("kohya_ss.json", "kohya_ss"),
        ("onetrainer.json", "OneTrainer"),
        ("sd_scripts.toml", "sd-scripts"),
        ("sd_scripts_dataset.toml", "sd-scripts' dataset configuration"),
    ],
)
def test_the_form_follows_from_the_content(folder: Path, name: str, form: str) -> None:
    (folder / "file").write_bytes((FIXTURES / name).read_bytes())
    assert import_file(folder / "file").form == form


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "a: " + "[" * 100_000, "x" * (MAX_BYTES + 1)])
def test_hostile_files_have_a_message(folder: Path, content: str) -> None:
    (folder / "file").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        import_file(folder / "file")


def test_a_table_that_holds_itself_has_a_message(folder: Path) -> None:
    (folder / "file").write_text(
        "job: &a\n  x: *a\nconfig: {name: x, process: [{type: sd_trainer, train: &b {x: *b}}]}\n"
    )
    with pytest.raises(ConfigError):
        import_file(folder / "file")


@pytest.mark.parametrize("name", ["a.json", "a.toml", "a.yml"])
def test_a_broken_file_says_where(folder: Path, name: str) -> None:
    (folder / name).write_text('{"a": [1,\n"', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not valid (JSON|TOML|YAML): .*line"):
        import_file(folder / name)


def test_a_byte_order_mark_is_skipped(folder: Path) -> None:
    (folder / "file").write_text("\ufeffnetwork_dim = 8\n", encoding="utf-8")
    assert option(import_file(folder / "file"), "lora.rank") == 8
