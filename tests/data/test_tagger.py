"""Taggers: which tags become a caption, what the network is given, and which files are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.taggers import ROWS, SIZE_PX, probabilities, write_onnx, write_tags
from numpy.typing import NDArray
from PIL import Image

from sdlora.data import tagger
from sdlora.data.tagger import (
    Network,
    Tag,
    Tagger,
    TagSettings,
    caption_from_tags,
    check_settings,
    load_tagger,
    pad_to_square,
    plain_name,
    read_tags,
)
from sdlora.errors import BaseModelError, ConfigError

CPU = torch.device("cpu")
TAGS = [
    Tag("general", "rating"), Tag("explicit", "rating"), Tag("1girl", "general"), Tag("long_hair", "general"),
    Tag("o_o", "general"), Tag("zumi_(series)", "character"), Tag("mizu", "character"), Tag("series", "copyright"),
    Tag("some_artist", "artist"), Tag("highres", "5"),
]  # fmt: skip
FOUND = [0.2, 0.1, 0.5, 0.9, 0.35, 0.86, 0.99, 0.9, 0.95, 1.0]


@pytest.mark.parametrize(
    ("settings", "caption"),
    [
        (TagSettings(), "mizu, zumi (series), long hair, 1girl, o_o"),
        (TagSettings(general_threshold=0.36, character_threshold=0.9), "mizu, long hair, 1girl"),
        (TagSettings(general_threshold=0.91, character_threshold=1), ""),
        (TagSettings(trigger="zumi"), "zumi, mizu, zumi (series), long hair, 1girl, o_o"),
        (TagSettings(trigger="Long Hair"), "Long Hair, mizu, zumi (series), 1girl, o_o"),
        (TagSettings(exclude=("Long hair", "zumi_(series)", "o_o")), "mizu, 1girl"),
        (
            TagSettings(trigger="z", include=frozenset({"rating", "artist", "copyright"})),
            "z, some artist, mizu, zumi (series), series, long hair, 1girl, o_o, general",
        ),
        # The second best rating does not take the place of an excluded one.
        (
            TagSettings(include=frozenset({"rating"}), exclude=("general",)),
            "mizu, zumi (series), long hair, 1girl, o_o",
        ),
    ],
)  # fmt: skip
def test_caption_has_the_chosen_tags_in_order(settings: TagSettings, caption: str) -> None:
    check_settings(TAGS, settings)
    assert caption_from_tags(TAGS, FOUND, settings) == caption


KAOMOJI = "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_|| :3 ;) \\m/ ^^^ !?"


@pytest.mark.parametrize("name", KAOMOJI.split())
def test_kaomoji_keep_their_underscores(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize("name", ["long_hair", "a_girl", "t-shirt_up", "c.c._(code_geass)", "k_(anime)", "1boy"])
def test_other_tags_get_spaces(name: str) -> None:
    assert plain_name(name) == name.replace("_", " ")


def test_settings_that_the_tags_do_not_have_are_refused_at_once() -> None:
    tags = [tag for tag in TAGS if tag.category != "artist"]
    settings = TagSettings(include=frozenset({"artist", "rating"}), exclude=("lnog hair", "1girl", "xyzzy"))
    with pytest.raises(ConfigError) as caught:
        check_settings(tags, settings)
    assert all(word in str(caught.value) for word in ("'artist'", "'lnog hair'", "'long hair'", "'xyzzy'"))
    assert "1girl" not in str(caught.value) and "rating" not in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(40, 21), (21, 40), (16, 16), (30, 30), (300, 7)])
def test_image_is_padded_with_white_and_scaled(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    sides = ((top, side - height - top), (left, side - width - left), (0, 0))
    square = Image.fromarray(np.pad(pixels, sides, constant_values=255))
    found = pad_to_square(Image.fromarray(pixels), 16)
    assert found.tobytes() == square.resize((16, 16), Image.Resampling.BICUBIC).tobytes()


def test_long_strip_needs_no_square_of_its_length() -> None:
    strip = Image.new("RGB", (1_000_000, 2), "red")
    found = pad_to_square(strip, 16)
    assert (found.size, found.getpixel((0, 0)), strip.size) == ((16, 16), (255, 255, 255), (1_000_000, 2))


def test_network_gets_rgb_pixels_of_its_size_and_must_match_the_tags() -> None:
    given: list[NDArray[np.uint8]] = []

    def network(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        given.append(pixels)
        red = torch.from_numpy(pixels.copy()).float().mean((0, 1))[0] / 255
        return torch.stack([red, 1 - red]).numpy()

    tags = [Tag("red", "general"), Tag("not_red", "general")]
    image = Image.new("RGB", (50, 50), (255, 0, 0))
    assert Tagger(Network(8, network), tags, TagSettings()).caption(image) == "red"
    assert (given[0].shape, given[0].dtype, given[0][0, 0].tolist()) == ((8, 8, 3), np.uint8, [255, 0, 0])
    with pytest.raises(BaseModelError, match="3 tags"):
        Tagger(Network(8, network), [*tags, Tag("blue", "general")], TagSettings()).caption(image)


def test_tags_are_read_in_the_order_of_the_outputs(tmp_path: Path) -> None:
    file = tmp_path / "selected_tags.csv"
    rows = ["tag_id,name,category,count", "1,general,9,5", '2,"say_""hi"", you",0,4', "3,mizu,4,3", "4,ann,1,2"]
    file.write_text("\ufeff" + "\n".join([*rows, "5,b,3,1", "6,meta,5,1"]), encoding="utf-8")
    names = ["general", 'say_"hi", you', "mizu", "ann", "b", "meta"]
    kinds = ["rating", "general", "character", "artist", "copyright", "5"]
    assert read_tags(file) == [Tag(*pair) for pair in zip(names, kinds, strict=True)]


@pytest.mark.parametrize(
    "content", [b"", b"tag_id,name,category\n", b"name,count\na,1\n", b"name,category\na\n", b"name,category\n\xff,0\n"]
)
def test_broken_list_of_tags_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "selected_tags.csv"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=r"selected_tags\.csv"):
        read_tags(file)


# --- Networks ---------------------------------------------------------------------------------------------------------


def image_of(color: str) -> Image.Image:
    image = Image.new("RGB", (40, 30), color)
    image.paste("green", (5, 5, 25, 20))
    return image


def test_onnx_network_gets_bgr_from_0_to_255(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = write_onnx(tmp_path / "tagger")
    found = load_tagger(str(folder), TagSettings(trigger="zumi"), device=CPU)
    assert found.network.size_px == SIZE_PX
    for color, tag in (("blue", "blue theme"), ("red", "red theme")):
        pixels = np.asarray(pad_to_square(image_of(color), SIZE_PX))
        np.testing.assert_allclose(found.network.probabilities(pixels), probabilities(pixels), rtol=1e-4, atol=1e-5)
        words = found.caption(image_of(color)).split(", ")
        assert words[:2] == ["zumi", "zumi (series)"]
        assert [word for word in words if "theme" in word] == [tag]


@pytest.mark.parametrize(
    "shape", [("batch", 3, SIZE_PX, SIZE_PX), ("batch", "height", "width", 3), ("batch", SIZE_PX, 8, 3)]
)
def test_onnx_network_of_another_form_is_refused(tmp_path: Path, shape: tuple[str | int, ...]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(BaseModelError, match=r"\[1, 448, 448, 3\]"):
        load_tagger(str(write_onnx(tmp_path / "tagger", shape)), TagSettings(), device=CPU)


def test_broken_onnx_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = write_tags(tmp_path / "tagger")
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BaseModelError, match=r"model\.onnx could not be loaded"):
        load_tagger(str(folder), TagSettings(), device=CPU)


def test_timm_network_equals_timm_with_its_own_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depth": 1, "class_token": False, "global_pool": "avg"}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(ROWS), **arguments).eval()
    torch.nn.init.normal_(model.head.weight)
    colors = {"mean": (0.4, 0.5, 0.6), "std": (0.5, 0.4, 0.3), "input_size": (3, 32, 32), "crop_pct": 1.0}
    model.pretrained_cfg.update(colors | {"interpolation": "bicubic"})
    folder = write_tags(tmp_path / "tagger")
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    monkeypatch.setattr(tagger, "_WEIGHTS", {"timm": tagger._WEIGHTS["timm"]})
    found = load_tagger(str(folder), TagSettings(), device=CPU)
    square = pad_to_square(image_of("blue"), 32)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg, model=model))
    with torch.no_grad():
        expected = torch.sigmoid(model(transform(square)[[2, 1, 0]].unsqueeze(0)))[0]
    torch.testing.assert_close(torch.from_numpy(found.network.probabilities(np.asarray(square))), expected)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BaseModelError, match="timm could not load"):
        load_tagger(str(folder), TagSettings(), device=CPU)


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that are told to be installed; their networks are the names of the packages."""
    packages = ["onnxruntime", "timm"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    for loader, package in (("_load_onnx", "onnxruntime"), ("_load_timm", "timm")):
        monkeypatch.setattr(tagger, loader, lambda folder, device, package=package: package)
    return packages


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_weights_follow_what_is_there_and_installed(tmp_path: Path, installed: list[str]) -> None:
    def loaded() -> object:
        return load_tagger(str(folder), TagSettings(), device=CPU).network

    folder = files(write_tags(tmp_path), "config.json", "model.safetensors")
    assert loaded() == "timm"
    files(folder, "model.onnx")
    assert loaded() == "onnxruntime"
    installed.remove("onnxruntime")
    assert loaded() == "timm"
    (folder / "config.json").unlink()
    with pytest.raises(BaseModelError, match=r"config\.json"):
        loaded()
    installed.clear()
    with pytest.raises(BaseModelError, match=r"sdlora\[tagger\]"):
        loaded()


def test_only_the_files_that_are_read_are_downloaded(
    tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Sequence[str]]] = []

    def download(name: str, allow_patterns: Sequence[str]) -> str:
        asked.append((name, allow_patterns))
        return str(files(tmp_path, *(file for file in allow_patterns if file in ("config.json", "model.safetensors"))))

    monkeypatch.setattr(tagger, "snapshot_download", download)
    write_tags(tmp_path)
    assert load_tagger("owner/tagger", TagSettings(), device=CPU).network == "timm"  # type: ignore[comparison-overlap]
    assert asked == [
        ("owner/tagger", ["selected_tags.csv", "preprocess.json", "model.onnx"]),
        ("owner/tagger", ["selected_tags.csv", "preprocess.json", "config.json", "model.safetensors"]),
    ]


def test_model_with_another_preprocessing_is_refused(tmp_path: Path, installed: list[str]) -> None:
    folder = files(write_tags(tmp_path), "model.onnx", "preprocess.json")
    with pytest.raises(BaseModelError, match=r"preprocess\.json"):
        load_tagger(str(folder), TagSettings(), device=CPU)


@pytest.mark.parametrize("name", ["nobody/nothing", "no such folder; rm x", "--overwrite"])
def test_missing_model_is_reported(installed: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BaseModelError, match="could not be loaded"):
        load_tagger(name, TagSettings(), device=CPU)
