"""What a run's files say of themselves, and to whom."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import copying_from, run
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.config.schema_training import LossConfig
from sdlora.copycheck.verdict import EpochCheck
from sdlora.data.dataset import Example
from sdlora.errors import ConfigError
from sdlora.events import Exported, Notice
from sdlora.lora_files.read import describe_lora, read_file
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.export import caption_metadata, files_to_push, limits_elsewhere, presentable
from sdlora.run.folder import RunFolder

CHECKED = ["copycheck.enabled=true", "preview.num_captions=1"]


def thumbnail(file: Path) -> Image.Image | None:
    """The image in a file's metadata."""
    text = read_file(file).metadata.get("modelspec.thumbnail")
    if text is None:
        return None
    kind, _, data = text.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_thumbnail_is_a_preview_of_a_new_prompt(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "run", [*overrides, "preview.num_captions=1", "data.resolution_px=32"])
    image = thumbnail(tmp_path / "run" / "hero.safetensors")
    assert image is not None
    assert (image.format, max(image.size) <= 256) == ("JPEG", True)
    # Prompt 0 is a caption of the set; the first new one is prompt 1.
    shown, other = (
        Image.open(tmp_path / f"run/epochs/2/previews/prompt0{index}_seed0.png").convert("RGB") for index in (1, 0)
    )

    def compressed(preview: Image.Image) -> bytes:
        buffer = io.BytesIO()
        preview.save(buffer, format="JPEG", quality=80)
        return Image.open(buffer).tobytes()

    assert image.tobytes() == compressed(shown) != compressed(other)
    run(tmp_path / "without", [*overrides, "file.thumbnail=false"])
    assert thumbnail(tmp_path / "without" / "hero.safetensors") is None
    one, two = (load_file(tmp_path / name / "epochs/1/adapter.safetensors") for name in ("run", "without"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_copied_preview_is_not_presentable(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copying_from(1, monkeypatch)
    run(tmp_path / "run", [*overrides, *CHECKED, "train.epochs=1"])
    assert thumbnail(tmp_path / "run" / "hero.safetensors") is None
    request = PreviewRequest(("a caption", "a red ball"), (0,), "", 2, 1.0, num_captions=1)
    folder = tmp_path / "run" / "epochs" / "1"
    assert presentable(request, folder) == []
    check = EpochCheck.read(folder)
    assert check is not None
    replace(check, previews=[replace(match, significant=False) for match in check.previews]).write(folder)
    assert presentable(request, folder) == [("prompt01_seed0.png", "a red ball")]


def test_captions_and_folders_are_in_metadata_only_on_request(tmp_path: Path, overrides: list[str]) -> None:
    fast = ["preview.enabled=false", "train.epochs=1", "data.repeats=2"]
    run(tmp_path / "silent", [*overrides, *fast])
    said = json.dumps(read_file(tmp_path / "silent" / "hero.safetensors").metadata)
    assert "red ball" not in said and "ss_tag_frequency" not in said and "ss_dataset_dirs" not in said
    run(tmp_path / "open", [*overrides, *fast, "file.include_captions=true"])
    metadata = read_file(tmp_path / "open" / "hero.safetensors").metadata
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags.keys() == {"set"}
    assert tags["set"]["zumi"] == 5 and tags["set"]["a red ball"] == 1
    assert json.loads(metadata["ss_dataset_dirs"]) == {"set": {"n_repeats": 2, "img_count": 5}}


def test_captions_too_long_for_metadata_are_refused_before_the_run(
    tmp_path: Path, overrides: list[str], images: Path
) -> None:
    example = Example("a", tmp_path / "a", "word, " * 10, (8, 8), (8, 8))
    assert json.loads(caption_metadata([example])["ss_tag_frequency"]) == {tmp_path.name: {"word": 10}}
    with pytest.raises(ConfigError, match=r"file\.include_captions: .*262144"):
        caption_metadata([replace(example, caption=", ".join(map(str, range(40_000))))])


@pytest.mark.parametrize("names", ["kohya", "peft"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_file_has_the_requested_precision_and_format(
    tmp_path: Path, overrides: list[str], names: str, precision: str
) -> None:
    options = [f"file.format={names}", f"file.precision={precision}", "train.epochs=1", "train.learning_rate=1e-2"]
    events = run(tmp_path / "run", [*overrides, *options])
    (exported,) = (event for event in events if isinstance(event, Exported))
    assert exported.max_error == 0.0
    described = describe_lora(tmp_path / "run" / "hero.safetensors")
    assert described["names"] == names
    assert described["dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    told = " ".join(event.message for event in events if isinstance(event, Notice))
    assert f"Rounding the file to {precision} changes predictions by up to" in told
    assert ("This file has PEFT's names" in told) == (names == "peft")
    assert (tmp_path / "run/peft/unet/adapter_config.json").is_file() == (names == "peft")
    assert ("ComfyUI applies 0 of its 16 modules" in told) == (names == "peft")


def limits(proof: dict[str, Any] | None = None, **sections: Any) -> list[str]:
    return limits_elsewhere(RunConfig(**sections), proof or {})


def test_plain_file_has_no_limits() -> None:
    assert limits() == []


def test_ignored_timestep_rank_is_reported_with_the_measured_figure() -> None:
    lora = LoraConfig(timestep_rank_min=2, timestep_rank_alpha=2.0)
    (sentence,) = limits({"rank_mask_difference": 0.1234}, lora=lora)
    assert "12%" in sentence and "apply_timestep_rank" in sentence


def test_dora_and_zero_terminal_snr_are_reported() -> None:
    proof = {"num_modules": 16, "dora_elsewhere": {"ComfyUI": 0.023, "A1111": 4.5}}
    (sentence,) = limits(proof, lora=LoraConfig(dora=True))
    assert "all 16 modules" in sentence and "0.023" in sentence and "4.5" in sentence and "-peft" in sentence
    (sentence,) = limits(loss=LossConfig(zero_terminal_snr=True))
    assert "rescale_betas_zero_snr=True" in sentence


def test_dora_has_kohyas_names_and_a_copy_for_diffusers(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "run"
    run(folder, [*overrides, "preview.enabled=false", "lora.dora=true", "train.epochs=1", "train.learning_rate=1e-2"])
    tensors = load_file(folder / "hero.safetensors")
    scales = {key: tensor for key, tensor in tensors.items() if key.endswith(".dora_scale")}
    assert len(scales) == 16 and all(tensor.shape[1] == 1 for tensor in scales.values())
    main, copy = (read_file(folder / f"hero{ending}.safetensors").state for ending in ("", "-peft"))
    assert main.keys() == copy.keys()
    for name, weights in main.items():
        assert torch.equal(weights.down, copy[name].down) and torch.equal(weights.up, copy[name].up)
        assert weights.magnitude is not None and copy[name].magnitude is not None
        assert torch.equal(weights.magnitude.flatten(), copy[name].magnitude.flatten())  # type: ignore[union-attr]
    proof = json.loads((folder / "epochs/1/proof.json").read_text())
    assert proof["max_error"] == 0.0 and 0 < proof["dora_elsewhere"]["ComfyUI"] < proof["dora_elsewhere"]["A1111"]
    assert 'weight_name="hero-peft.safetensors"' in (folder / "README.md").read_text()
    assert "hero-peft.safetensors" in files_to_push(RunFolder(folder, "hero"))
