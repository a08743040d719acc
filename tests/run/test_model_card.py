"""The model card, read as the Hub reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import copying_from, run
from huggingface_hub import ModelCard

from sdlora.run.export import _hub_id

CHECKED = ["copycheck.enabled=true", "preview.num_captions=1", 'preview.prompts=["a red ball: \\"big\\"", "zumi"]']


def test_card_of_a_run_is_valid_for_the_hub(tmp_path: Path, overrides: list[str], others: Path) -> None:
    options = [
        *CHECKED,
        "file.licence=cc-by-4.0",
        "train.epochs=1",
        "data.repeats=2",
        f"data.validation_folder={others}",
    ]
    run(tmp_path / "run", [*overrides, *options])
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text).data.to_dict()
    assert card["instance_prompt"] == "zumi"
    assert card["license"] == "cc-by-4.0"
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion"} <= set(card["tags"])
    assert (card["library_name"], card["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "base_model" not in card, "a folder has no name on the Hub"
    assert [entry["text"] for entry in card["widget"]] == ['a red ball: "big"', "zumi"]
    for entry in card["widget"]:
        assert (tmp_path / "run" / entry["output"]["url"]).is_file()
    assert "**clean**: 0 of 3 previews" in text
    assert 'weight_name="hero.safetensors"' in text
    assert "5 images at 32 px" in text
    # Whose images they were, and what they show, stays the artist's.
    for secret in ("purple", "a green ball", str(tmp_path), "data0", "others"):
        assert secret not in text


def test_copied_preview_is_counted_and_not_shown(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copying_from(1, monkeypatch)
    run(tmp_path / "run", [*overrides, *CHECKED, "train.epochs=1", "file.include_captions=true"])
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "**copying**: 3 of 3 previews" in text
    assert "widget" not in ModelCard(text).data.to_dict()
    assert "## Licence" in text


def test_captions_are_in_card_on_request(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "run", [*overrides, *CHECKED, "train.epochs=1", "file.include_captions=true"])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert [entry["text"] for entry in card.data.to_dict()["widget"]][-1].startswith("zumi, a ")
    run(tmp_path / "bare", [*overrides, "train.epochs=1", "preview.enabled=false"])
    bare = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert "**clean**" not in bare and "copy check" in bare
    assert "widget" not in ModelCard(bare).data.to_dict()


def test_only_hub_ids_are_named_as_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    names = ["owner/name", "models/base", "pocket", "/somewhere/else/base", str(tmp_path / "models")]
    assert [_hub_id(name) for name in names] == ["owner/name", None, None, None, None]
