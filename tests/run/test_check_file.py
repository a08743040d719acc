"""The check of a finished file gives what the run itself found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.trainers import diffusers_script, kohya_trainer
from PIL import Image

from sdlora.config.toml import parse_config
from sdlora.copycheck.verdict import EpochCheck
from sdlora.errors import ConfigError, DataError
from sdlora.events import CopyChecked
from sdlora.lora_files.base_weights import paths_for
from sdlora.lora_files.read import read_file
from sdlora.lora_files.write import write_file
from sdlora.run.check_file import check_file
from sdlora.run.run import start


def document(tiny_base: Path, images: Path, folder: Path) -> dict[str, object]:
    return {
        "base": {"path": str(tiny_base)},
        "data": {"folder": str(images), "resolution_px": 32, "bucket_step_px": 8},
        "lora": {"rank": 2},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32", "learning_rate": 0.1},
        "preview": {"prompts": ["a red box"], "num_captions": 1, "num_steps": 2, "seeds": [0, 1], "sampler": "base"},
        "cache": {"dir": str(folder / "cache")},
    }


def test_file_gets_the_verdict_of_its_run(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    config = parse_config(document(tiny_base, images, tmp_path), name="n")
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


def test_check_without_previews_is_refused(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    config = parse_config(document(tiny_base, images, tmp_path), name="n")
    list(start(config, tmp_path / "run"))
    file = read_file(tmp_path / "run" / "n.safetensors")
    off = parse_config({**document(tiny_base, images, tmp_path), "copycheck": {"enabled": False}}, name="n")
    with pytest.raises(ConfigError, match=r"preview\.enabled"):
        list(check_file(file, off, tmp_path / "off"))
    other = parse_config({**document(tiny_base, images, tmp_path), "base": {"path": "pocket"}}, name="n")
    with pytest.raises(DataError):
        list(check_file(file, other, tmp_path / "other"))
    assert not (tmp_path / "off").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("trainer", ["diffusers script", "diffusers script, older names", "kohya"])
def test_file_of_another_trainer_is_checked_with_the_previews_diffusers_draws(
    tiny_base: Path, images: Path, tmp_path: Path, trainer: str
) -> None:
    def fresh() -> Any:
        return StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)

    file, peft = tmp_path / "theirs.safetensors", tmp_path / "converted.safetensors"
    if trainer == "kohya":
        kohya_trainer(file, fresh(), text=True, alpha=2.0)
    else:
        # diffusers drops parts of the text encoder from its own older names since transformers 5.
        older = trainer.endswith("names")
        diffusers_script(file, fresh(), text=not older, old_names=older)
    source = read_file(file)
    write_file(peft, source.state, metadata={}, paths=paths_for(source.state, tiny_base))
    config = parse_config(document(tiny_base, images, tmp_path), name="n")
    expected = fresh()
    expected.load_lora_weights(file.parent, weight_name=file.name)
    drawn = expected(
        ["a red box"], num_inference_steps=2, guidance_scale=7.5, generator=[torch.Generator().manual_seed(1)]
    ).images[0]
    plain = fresh()(
        ["a red box"], num_inference_steps=2, guidance_scale=7.5, generator=[torch.Generator().manual_seed(1)]
    ).images[0]
    for checked in (file, peft):
        folder = tmp_path / checked.stem
        *_, event = check_file(read_file(checked), config, folder)
        assert isinstance(event, CopyChecked)
        found = Image.open(folder / "previews" / "prompt01_seed1.png")
        assert distance(found, drawn) <= 2 < distance(found, plain)


def distance(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of any pixel, of 255."""
    return int((torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))).abs().max())
