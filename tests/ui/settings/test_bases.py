"""Base models by their files alone: which there are, what is wrong with a name, their shapes and their presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.studios import write_base
from safetensors.torch import save_file

from sdlora.errors import ConfigError
from sdlora.estimate.meta_model import shapes_of_base, shapes_of_family
from sdlora.models.architectures import ARCHITECTURES, Identified
from sdlora.ui.settings import bases
from sdlora.ui.state.folders import Studio


def test_shapes_of_folder_are_those_of_loaded_base(tiny_base: Path) -> None:
    from sdlora.models.load import load_base

    loaded = shapes_of_base(load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32))
    found = bases.shapes_of(str(tiny_base))
    assert found is not None
    assert (found.frozen_bytes, found.resolution_px, len(found.text_encoders)) == (
        loaded.frozen_bytes, loaded.resolution_px, len(loaded.text_encoders)
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "xl.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    return file


def test_shapes_of_single_file_follow_from_its_header(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bases.shapes_of(str(file)) is None
    monkeypatch.setattr(bases, "_read_header", lambda *_: Identified("sdxl", "epsilon", False, ARCHITECTURES["sdxl"]))
    assert bases.shapes_of(str(file)) == shapes_of_family("sdxl")
    assert bases.base_resolution_px(str(file)) == 1024
    assert bases.base_resolution_px("owner/name") == 512


def test_resolution_is_the_base_models(tiny_base: Path) -> None:
    assert [bases.base_resolution_px(base) for base in ("pocket", str(tiny_base), "owner/name")] == [64, 32, 512]


def test_known_bases_include_the_studios_folder(studio: Studio) -> None:
    folder = studio.runs / "bases"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "model_index.json").write_text("{}")
    for name in ("a.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"")
    closed = Studio(studio.runs, any_folder=False)
    assert bases.known_bases(closed) == ["pocket", str(folder / "a.safetensors"), str(folder / "mine")]


@pytest.mark.parametrize(
    ("identified", "name", "presets"),
    [
        (Identified("sd1", "epsilon", False, ARCHITECTURES["sd1"]), "photos.safetensors", "sd15"),
        (Identified("sdxl", "epsilon", False, ARCHITECTURES["sdxl"]), "photos.safetensors", "sdxl"),
        (Identified("sdxl", "epsilon", False, ARCHITECTURES["sdxl"]), "My-Illustrious_v2.safetensors", "illustrious"),
        (Identified("sdxl", "v_prediction", True, ARCHITECTURES["sdxl"]), "noobai-vpred.safetensors", "noobai-v"),
        (Identified("sdxl", "v_prediction", False, ARCHITECTURES["sdxl"]), "photos.safetensors", "noobai-v"),
        (Identified("sd2", None, False, ARCHITECTURES["sd2"]), "anime.safetensors", None),
    ],
)
def test_presets_of_a_file_follow_from_its_header_and_name(
    identified: Identified, name: str, presets: str | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "_read_header", lambda *_: identified)
    assert bases.preset_family(str(file.rename(file.with_name(name)))) == presets


@pytest.mark.parametrize(
    ("family", "prediction_type", "presets"),
    [
        ("sd1", "epsilon", "sd15"),
        ("sdxl", "epsilon", "sdxl"),
        ("sdxl", "v_prediction", "noobai-v"),
        ("sd2", "", None),
        ("z-image", "", "z-image"),
        ("flux2-klein-4b", "", "flux2-klein"),
        ("flux2-klein-9b", "", "flux2-klein"),
    ],
)
def test_presets_of_a_folder_follow_from_its_configurations(
    family: str, prediction_type: str, presets: str | None, tmp_path: Path
) -> None:
    folder = write_base(tmp_path / "base", family, prediction_type)
    assert bases.preset_family(str(folder)) == presets
    assert bases.preset_family(str(folder.rename(tmp_path / "noob"))) == (
        "illustrious" if presets == "sdxl" else presets
    )


@pytest.mark.parametrize("base", ["owner/name", "/no/such/file.safetensors", "x" * 5000, "~nobody-here/x", ""])
def test_presets_of_an_absent_base_are_not_known(base: str) -> None:
    assert bases.preset_family(base) is None


@pytest.mark.parametrize(
    "base",
    [
        "<b>x</b>", "/no/such/folder", "models/missing.safetensors", "just words", "x" * 5000, "~nobody-here/x",
        "a/b/c", "../x", "--/x", "http://127.0.0.1/x",
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_is_refused(base: str, studio: Studio) -> None:
    for one in (studio, Studio(studio.runs, any_folder=False)):
        with pytest.raises(ConfigError):
            bases.check_base(one, base)


def test_a_file_or_folder_that_is_no_base_is_refused(studio: Studio, file: Path, tiny_base: Path) -> None:
    for place in (file, file.parent):
        with pytest.raises(ConfigError):
            bases.check_base(studio, str(place))
    for base in ("pocket", "owner/name", str(tiny_base)):
        bases.check_base(studio, base)
