"""`sdlora caption --tagger`: captions in tags beside the images, and none replaced."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command import call
from helpers.taggers import ROWS, SIZE_PX, probabilities, write_onnx, write_tags
from numpy.typing import NDArray
from PIL import Image

from sdlora.data import tagger
from sdlora.data.tagger import Network

COLORS = {"a": "red", "b": "green", "c": "blue", "d": "white", "e": "black"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images; b has a caption of its own, c one in the list, e one for another trainer."""
    made = tmp_path / "images"
    made.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (40, 40), color).save(made / f"{name}.png")
    (made / "b.txt").write_text("my own words", encoding="utf-8")
    (made / "metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "text": "listed"}), encoding="utf-8")
    (made / "e.caption").write_text("1girl, solo", encoding="utf-8")
    return made


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tagger whose network is computed without onnxruntime, so that all of this is tested without it."""
    made = write_tags(tmp_path / "tagger")
    (made / "model.onnx").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(tagger, "_load_onnx", lambda folder, device: Network(SIZE_PX, stand_in))
    return str(made)


def stand_in(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return probabilities(pixels).astype(np.float32)


def captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}


def test_tags_are_written_and_captions_kept(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "caption", str(folder), "--tagger", model, "--trigger", "zumi")
    assert (code, "2 captions written" in out) == (0, True), err
    assert captions(folder) == {
        "a": "zumi, zumi (series), red theme, 1girl, ^_^\n",
        "b": "my own words",
        "d": "zumi, zumi (series), 1girl, long hair, blue theme, red theme, ^_^\n",
    }
    code, out, _ = call(capsys, "caption", str(folder), "--tagger", model)
    assert (code, "Every image in" in out) == (0, True)
    code, _, err = call(capsys, "caption", str(folder), "--tagger", model, "--overwrite")
    assert code == 0, err
    assert captions(folder)["b"].startswith("zumi (series), ")
    assert sorted(captions(folder)) == ["a", "b", "d"]


def test_options_change_the_tags(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def first(*options: str) -> str:
        code, _, err = call(capsys, "caption", str(folder), "--tagger", model, "--overwrite", *options)
        assert code == 0, err
        return captions(folder)["a"].strip()

    assert first() == "zumi (series), red theme, 1girl, ^_^"
    assert first("--general-threshold", "0.5") == "zumi (series), red theme, 1girl"
    assert first("--character-threshold", "0.7") == "zumi (series), mizu, red theme, 1girl, ^_^"
    assert first("--with", "rating") == "zumi (series), red theme, 1girl, ^_^, sensitive"
    assert first("--exclude", "red theme, zumi_(series)") == "1girl, ^_^"
    assert first("--trigger", "zumi") == "zumi, zumi (series), red theme, 1girl, ^_^"


def test_interrupted_tagging_continues_with_the_rest(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def interrupted(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(int(pixels[0, 0, 1]))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stand_in(pixels)

    monkeypatch.setattr(tagger, "_load_onnx", lambda folder, device: Network(SIZE_PX, interrupted))
    code, _, _ = call(capsys, "caption", str(folder), "--tagger", model)
    assert code != 0
    assert (sorted(captions(folder)), list(folder.glob("*.tmp*"))) == (["a", "b"], [])
    code, out, err = call(capsys, "caption", str(folder), "--tagger", model)
    assert (code, "1 caption written" in out) == (0, True), err
    assert (sorted(captions(folder)), seen) == (["a", "b", "d"], [0, 255, 255])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], ["--model", "--tagger"]),
        (["--model", "x", "--tagger", "y"], ["--model", "--tagger"]),
        (["--tagger", "y", "--prompt", "a", "--max-tokens", "60"], ["--prompt", "--max-tokens"]),
        (["--model", "x", "--with", "rating", "--general-threshold", "0.35"], ["--with", "--general-threshold"]),
        (["--tagger", "y", "--with", "rating,meta"], ["'meta'", "artist"]),
        (["--tagger", "TAGGER", "--with", "artist", "--exclude", "1gril"], ["'artist'", "'1gril'", "'1girl'"]),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], options: list[str], named: list[str]
) -> None:
    code, out, err = call(capsys, "caption", str(folder), *(model if part == "TAGGER" else part for part in options))
    assert (code, out) == (2, "")
    assert all(word in err for word in named), err
    assert sorted(captions(folder)) == ["b"]


def test_onnx_tagger_captions_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = write_onnx(tmp_path / "onnx")
    code, _, err = call(capsys, "caption", str(folder), "--tagger", str(model), "--with", "rating")
    assert code == 0, err
    assert captions(folder)["a"] == "zumi (series), red theme, 1girl, ^_^, sensitive\n"
    assert len(ROWS) == len((model / "selected_tags.csv").read_text(encoding="utf-8").splitlines()) - 1
