"""The check of a finished file gives what the run itself found."""

from pathlib import Path

import pytest

from sdlora.checkfile import check_file
from sdlora.configfile import parse_config
from sdlora.errors import ConfigError, DataError
from sdlora.events import CopyChecked
from sdlora.lora.formats import read_file
from sdlora.preview.copycheck import EpochCheck
from sdlora.run import start


def document(tiny_base: Path, pictures: Path, folder: Path) -> dict[str, object]:
    return {
        "base": {"path": str(tiny_base)},
        "data": {"folder": str(pictures), "resolution_px": 32, "bucket_step_px": 8},
        "lora": {"rank": 2},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32", "learning_rate": 0.1},
        "preview": {"prompts": ["a red box"], "num_captions": 1, "num_steps": 2},
        "cache": {"dir": str(folder / "cache")},
    }


def test_a_file_is_checked_as_its_run_was(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    config = parse_config(document(tiny_base, pictures, tmp_path), name="n")
    list(start(config, tmp_path / "run"))
    *_, event = check_file(read_file(tmp_path / "run" / "n.safetensors"), config, tmp_path / "check")
    assert isinstance(event, CopyChecked)
    own, found = EpochCheck.read(tmp_path / "run" / "epochs" / "1"), EpochCheck.read(tmp_path / "check")
    assert own is not None and found is not None
    assert found.verdict == own.verdict == event.verdict
    for ours, theirs in zip(own.previews, found.previews, strict=True):
        # The file is float16 or float32 rounded; previews differ by a grey level at most.
        assert (ours.nearest, ours.kind, ours.prompt, ours.seed) == (
            theirs.nearest, theirs.kind, theirs.prompt, theirs.seed,
        )  # fmt: skip
        assert ours.hp_ms == pytest.approx(theirs.hp_ms, abs=0.02)


def test_what_cannot_be_checked_is_refused(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    config = parse_config(document(tiny_base, pictures, tmp_path), name="n")
    list(start(config, tmp_path / "run"))
    file = read_file(tmp_path / "run" / "n.safetensors")
    off = parse_config({**document(tiny_base, pictures, tmp_path), "copycheck": {"enabled": False}}, name="n")
    with pytest.raises(ConfigError, match="leave preview"):
        list(check_file(file, off, tmp_path / "off"))
    other = parse_config({**document(tiny_base, pictures, tmp_path), "base": {"path": "pocket"}}, name="n")
    with pytest.raises(DataError):
        list(check_file(file, other, tmp_path / "other"))
    assert not (tmp_path / "off").exists() and not (tmp_path / "other").exists()
