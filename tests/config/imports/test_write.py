"""The TOML file of a translation."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from sdlora.config.imports.rules import Fate, Imported, Status
from sdlora.config.imports.write import as_toml, shown, shown_value


def fate(key: str, value: Any, status: Status = Status.REFUSED) -> Fate:
    return Fate(key, value, status, {}, "because\nof this")


def test_what_is_written_reads_back_as_the_same() -> None:
    document = {
        "lora": {"target_ranks": {"conv": 4}, "rank": 8},
        "data": {"sets": [{"folder": "C:\\a", "repeats": 2, "caption": 'a "b"'}, {"folder": "c"}], "keep_tags": 0},
        "name": "hero",
        "preview": {"prompts": ["a\nb", "ü"]},
    }
    text = as_toml(Imported("test", document, (fate("rate", "x\ny"),)), "a\nfile.json")
    assert tomllib.loads(text) == document
    assert text.index("[data]") < text.index("[lora]"), "sections are in the schema's order"
    assert text.startswith("# Translated from a file.json (test)")
    assert "#   rate = x y: because of this\n" in text


@pytest.mark.parametrize(
    ("key", "hidden"),
    [
        ("huggingface_token", True), ("wandb_api_key", True), ("secrets", True), ("hub_token", True),
        ("keep_tokens", False), ("max_token_length", False), ("process.datasets.shuffle_tokens", False),
    ],
)  # fmt: skip
def test_only_secrets_are_hidden(key: str, hidden: bool) -> None:
    assert (shown_value(fate(key, "abc")) == "(not shown)") is hidden


def test_long_values_are_cut() -> None:
    assert len(shown("x" * 100)) == 60
    assert shown(None) == ""
