"""Bases by their files alone, and recipes that fit into the memory there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.shipped import pocket_folder
from sdlora.training.metabase import shapes_of_base, shapes_of_family
from sdlora.ui import bases, plan
from sdlora.ui.draft import Draft
from sdlora.ui.recipes import SUBJECTS
from sdlora.ui.store import Studio


def test_a_folder_is_told_by_its_configurations(tiny_base: Path) -> None:
    from sdlora.models.load import load_base

    loaded = shapes_of_base(load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32))
    found = bases.shapes_of(str(tiny_base))
    assert found is not None
    assert (found.frozen_bytes, found.resolution_px, len(found.text_encoders)) == (
        loaded.frozen_bytes, loaded.resolution_px, len(loaded.text_encoders)
    )  # fmt: skip


def test_a_checkpoint_in_one_file_is_told_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "xl.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert bases.shapes_of(str(file)) is None, "it is no base"
    recognised = type("Recognised", (), {"family": "sdxl"})
    monkeypatch.setattr(bases, "recognise", lambda *_: recognised)
    assert bases.shapes_of(str(file)) == shapes_of_family("sdxl")
    assert plan.base_resolution_px(str(file)) == 1024
    assert plan.base_resolution_px("owner/name") == 512


def test_what_lies_in_the_studios_folder_can_be_chosen(studio: Studio) -> None:
    folder = studio.runs / "bases"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "model_index.json").write_text("{}")
    for name in ("a.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"")
    closed = Studio(studio.runs, any_folder=False)
    assert bases.known_bases(closed) == ["pocket", str(folder / "a.safetensors"), str(folder / "mine")]


@pytest.fixture
def large(tmp_path: Path) -> str:
    """The built-in base's shapes at 512 px, without weights."""
    for part in ("unet", "vae", "text_encoder"):
        content = json.loads((pocket_folder() / part / "config.json").read_text(encoding="utf-8"))
        if part == "unet":
            content["sample_size"] *= 8
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_recipe_fits_into_the_memory_there_is(subject: str, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "device_name", lambda _: "cuda:0")
    monkeypatch.setattr(bases, "room_bytes", lambda _: 1 << 40)
    greedy = Draft().with_values({"train.batch_size": 2, "train.precision": "fp32", "base.path": large})
    needed = greedy.needs()
    assert needed is not None
    orders = []
    for share in (2.0, 0.75, 0.5, 0.3):
        memory_bytes = int(share * needed.peak_bytes) >> 28 << 28
        monkeypatch.setattr(bases, "room_bytes", lambda _, found=memory_bytes: found)
        fitted = greedy.made_to_fit()
        found = fitted.needs()
        assert found is not None and found.peak_bytes <= memory_bytes
        assert not found.values and any("It fits" in one for one in plan.memory_in_words(fitted))
        orders.append([told.split(" = ")[0] for told in fitted.fitted])
    whole = ["train.precision", "train.batch_size", "train.gradient_checkpointing", "data.resolution_px"]
    assert orders[0] == [] and all(order == whole[: len(order)] for order in orders) and orders[-1]
    answered = fitted.with_answers(subject, "as usual", large)
    assert (answered.needs() or needed).peak_bytes <= memory_bytes, "an answer proposes what fits, too"


def test_what_cannot_fit_or_is_not_here_is_said(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft().with_values({"base.path": large})
    monkeypatch.setattr(bases, "room_bytes", lambda _: 0)
    assert "choose a smaller base" in plan.memory_in_words(draft)[-1]
    assert "not on this machine" in plan.memory_in_words(draft.with_values({"base.path": "no/where"}))[0]
