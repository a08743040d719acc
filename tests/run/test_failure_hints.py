"""What to change, with its value and the next lower one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.config.toml import parse_config
from sdlora.run.failure_hints import diverged, out_of_memory, phase_of
from sdlora.run.folder import RunFolder
from sdlora.training.trainer import Trainer


@pytest.mark.parametrize(
    ("phase", "train", "told"),
    [
        ("load", {"precision": "fp32"}, "train.precision to 'bf16' (now 'fp32')"),
        ("load", {"precision": "bf16", "device": "cuda"}, "base.quantization to 'int8' (now 'none')"),
        ("train", {"batch_size": 6, "gradient_accumulation_steps": 2}, "train.batch_size to 3 (now 6)"),
        ("train", {"batch_size": 6, "gradient_accumulation_steps": 2}, "accumulation_steps to 4 (now 2)"),
        ("train", {}, "train.gradient_checkpointing=true (now false)"),
        ("train", {"gradient_checkpointing": True}, "data.resolution_px = 448 (now 512)"),
        ("train", {"batch_size": 6, "auto_batch": True}, "train.gradient_checkpointing=true (now false)"),
        ("cache", {}, "data.resolution_px = 448 (now 512)"),
        ("preview", {}, "preview.enabled=false (now true)"),
    ],
)
def test_every_phase_has_its_setting(phase: str, train: dict[str, object], told: str) -> None:
    config = parse_config({"data": {"folder": "x"}, "train": train}, name="x")
    assert told in out_of_memory(config, phase)


def test_a_base_is_kept_in_fewer_bits_and_at_last_on_the_cpu() -> None:
    for now, told in (("int8", "base.quantization to 'nf4' (now 'int8')"), ("nf4", "train.device to 'cpu'")):
        document = {"data": {"folder": "x"}, "base": {"quantization": now}, "train": {"precision": "bf16"}}
        assert told in out_of_memory(parse_config(document, name="x"), "load")


def test_where_nothing_is_smaller_the_rank_is_lowered() -> None:
    document = {"data": {"folder": "x", "resolution_px": 64}, "lora": {"rank": 16}}
    config = parse_config(document | {"train": {"gradient_checkpointing": True}}, name="x")
    assert "lora.rank = 8 (now 16)" in out_of_memory(config, "train")


def test_the_phase_is_where_the_error_came_from() -> None:
    try:
        Trainer._gradients(None, [], 1)  # type: ignore[arg-type]
    except AttributeError as error:
        assert phase_of(error) == "train"
    assert phase_of(torch.OutOfMemoryError()) == "cache"


def test_the_last_good_epoch_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "hero")
    assert diverged("It broke.", folder) == "It broke. No epoch was finished before."
    for epoch in (1, 2):
        folder.epoch(epoch).mkdir(parents=True)
        folder.epoch_lora(epoch).touch()
    assert diverged("It broke.", folder) == f"It broke. The last good epoch is kept: {folder.epoch_lora(2)}."
