"""The presets that ship: each is valid, says what it is for, and differs from its family as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.common.bundled import shipped_configs
from sdlora.config.presets import Preset, presets
from sdlora.config.toml import load_config, read_config
from sdlora.errors import ConfigError

FAMILIES = {
    "sd15": "sd1", "sdxl": "sdxl", "illustrious": "sdxl", "noobai-v": "sdxl", "z-image": "z-image",
    "flux2-klein": "flux2-klein-4b",
}  # fmt: skip


def test_every_family_has_a_preset_for_every_subject() -> None:
    found = {preset.name: preset.family for preset in presets()}
    expected = {
        f"{base}-{subject}": family for base, family in FAMILIES.items() for subject in ("character", "object", "style")
    }
    assert found == {**expected, "quickstart": "pocket"}
    assert set(shipped_configs()) == found.keys() | FAMILIES.keys()


@pytest.mark.parametrize("preset", presets(), ids=lambda preset: preset.name)
def test_preset_is_valid_and_says_its_purpose(preset: Preset) -> None:
    name, family, purpose = preset[:3]
    config = load_config(name, ["data.folder=images"] if name != "quickstart" else [])
    assert config.base.family == family
    assert purpose.endswith(".")
    if name != "quickstart":
        assert config.data.repeats_range[0] * config.train.epochs + config.train.epochs >= 20
        assert config.train.exposures in (50, 100)
        if family in ("z-image", "flux2-klein-4b"):
            assert config.lora.alpha == config.lora.rank and {"attention", "mlp"} == set(config.lora.targets)
        else:
            assert config.lora.alpha / config.lora.rank == 0.5
            assert {"cross_attention", "self_attention", "mlp"} <= set(config.lora.targets)


def test_v_prediction_presets_set_their_schedule() -> None:
    config = load_config("noobai-v-character", ["data.folder=images"])
    assert (config.base.prediction_type, config.loss.zero_terminal_snr) == ("v_prediction", True)
    assert config.data.shuffle_tags


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_extending_file_replaces_values_and_keeps_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path / "below.toml",
        "seed = 3\n[data]\nfolder = 'x'\ntrigger = 'zumi'\n[lora]\ntargets = ['mlp']\nrank = 4\n",
    )
    above = write(tmp_path / "above.toml", "extends = 'below.toml'\n[lora]\ntargets = ['self_attention']\nalpha = 2\n")
    config = load_config(above)
    assert (config.name, config.seed, config.data.triggers) == ("above", 3, ["zumi"])
    assert (config.lora.targets, config.lora.rank, config.lora.alpha) == (["self_attention"], 4, 2)


def test_bundled_configuration_can_be_extended_from_anywhere(tmp_path: Path) -> None:
    document, _ = read_config(write(tmp_path / "mine.toml", "extends = 'sdxl-style'\n[lora]\nrank = 32\n"))
    assert document["lora"]["rank"] == 32
    assert "conv" in document["lora"]["targets"]
    assert "extends" not in document


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("extends = 'self.toml'", r"self extends self"),
        ("extends = './self.toml'", r"extends itself"),
        ("extends = 3", r"extends = 3"),
        ("extends = 'sdxl-styl'", r"sdxl-styl.*'sdxl-style'"),
        ("extends = 'absent.toml'", r"absent\.toml"),
    ],
)
def test_impossible_extends_is_refused(text: str, facts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=facts):
        read_config(write(tmp_path / "self.toml", text))
