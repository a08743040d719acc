"""A fingerprint follows what the result follows from, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file

from sdlora.batch import fingerprint
from sdlora.batch.batch import _fingerprinted, decide
from sdlora.batch.fingerprint import Fingerprints, base_content
from sdlora.batch.jobs import Job
from sdlora.batch.location import Record
from sdlora.config.toml import parse_config


def of(folder: Path, overrides: Sequence[str] = ()) -> str:
    return Fingerprints().of(parse_config({"data": {"folder": str(folder)}}, name="x", overrides=overrides))


def test_settings_images_captions_and_version_change_it(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    before = of(mine)
    assert of(mine) == before
    assert of(mine, ["lora.rank=3"]) != before
    assert of(mine, ["cache.dir=elsewhere", "train.log_every_steps=3"]) == before
    (mine / "notes.md").write_text("no part of the set")
    assert of(mine) == before
    (mine / "red.txt").write_text("a red ball!")
    changed = of(mine)
    assert changed != before
    (mine / "red.png").write_bytes((mine / "blue.png").read_bytes())
    assert of(mine) not in (before, changed)
    shutil.rmtree(mine)
    assert of(mine) not in (before, changed)
    shutil.copytree(images, mine)
    assert of(mine) == before
    monkeypatch.setattr(fingerprint, "__version__", "0.0.0")
    assert of(mine) != before


def test_validation_images_change_it(tmp_path: Path, images: Path, others: Path) -> None:
    held = tmp_path / "held"
    shutil.copytree(others, held)
    before = of(images, [f"data.validation_folder={held}"])
    (held / "pink.txt").write_text("another")
    assert of(images, [f"data.validation_folder={held}"]) != before


def test_content_of_the_base_changes_it(tmp_path: Path, images: Path, tiny_base: Path) -> None:
    base, unet = tmp_path / "base", tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_base, base)
    setting = [f"base.path={base}"]
    before = of(images, setting)
    shutil.rmtree(base)
    shutil.copytree(tiny_base, base)
    assert of(images, setting) == before  # whatever the files' times
    tensors = load_file(unet)
    save_file({key: tensor + 1e-3 for key, tensor in tensors.items()}, unet)
    changed = of(images, setting)
    assert changed != before
    # So a batch trains its job anew instead of skipping it.
    job = Job("a", 0, {}, parse_config({"data": {"folder": str(images)}}, name="a", overrides=setting))
    assert decide(job, Record("done", before), changed, retry=False)[0] == "start"
    assert decide(job, Record("done", changed), changed, retry=False)[0] == "skip"
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert of(images, setting) not in (before, changed)


@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_large_base_is_sampled_from_end_to_end(tmp_path: Path, where: str) -> None:
    file = tmp_path / "base.safetensors"
    numbers = torch.randn(1 << 20)
    save_file({"weight": numbers}, file)
    before = base_content(str(file))
    assert base_content(str(file)) == before
    if where == "middle":
        numbers[1 << 18 : 1 << 19] += 1e-3  # a quarter of the weights, such as one network of a checkpoint
    else:
        numbers[0 if where == "first" else -1] += 1
    save_file({"weight": numbers}, file)
    assert base_content(str(file)) != before


def test_job_with_missing_images_stops_no_other(images: Path) -> None:
    folders = ["memory://there/is/nothing", "builtin:none", "none://is/no/store", str(images)]
    configs = [parse_config({"data": {"folder": folder}}, name="x") for folder in folders]
    *missing, whole = _fingerprinted([Job(str(n), 0, {}, config) for n, config in enumerate(configs)])
    assert [found for _, found in missing] == ["no such set"] * 3
    assert whole[1] == of(images)


def test_unreachable_store_restarts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: 1 / 0)
    config = parse_config({"data": {"folder": "memory://bucket/set"}}, name="x")
    ((job, found),) = _fingerprinted([Job("a", 0, {}, config)])
    action, record = decide(job, Record("done", "as before", epoch=2), found, retry=True)
    assert (action, record.status, record.outcome[0]) == ("fault", "done", "failed")
    assert record.fault is not None and "memory://bucket/set" in record.fault


def test_every_set_changes_it(tmp_path: Path, images: Path, others: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(others, changing)
    config = parse_config({"data": {"sets": [{"folder": str(images)}, {"folder": str(changing)}]}}, name="x")
    before = Fingerprints().of(config)
    assert Fingerprints().of(config) == before
    (changing / "pink.txt").write_text("another")
    assert Fingerprints().of(config) != before
