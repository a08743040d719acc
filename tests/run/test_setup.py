"""What is loaded for a run and kept between runs, and what a run says when memory runs out or training diverges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config, parse_config
from sdlora.errors import ConfigError, OutOfMemoryError
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base
from sdlora.run import setup
from sdlora.run.arguments import make_adapter
from sdlora.run.folder import RunFolder
from sdlora.run.run import diverged_message, start
from sdlora.run.setup import BasePool, fresh_base


@pytest.fixture
def products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, "high"),
        ("cuda", torch.float16, "high"),
        ("cuda", torch.float32, "highest"),
        ("cpu", torch.bfloat16, "medium"),
    ],
)
def test_float32_matmul_precision_on_a_gpu_follows_the_unets_type(
    device: str, dtype: torch.dtype, expected: str, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("medium")  # what a CPU is left at
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: SimpleNamespace())
    config = parse_config({"data": {"folder": "x"}}, name="x")
    setup.fresh_base(config, torch.device(device), dtype)
    assert torch.get_float32_matmul_precision() == expected


CPU = torch.device("cpu")
FORMS = [
    ['lora.targets=["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"]'],
    ["lora.dora=true"],
    ["lora.init=pissa", "lora.timestep_rank_min=1"],
]


def settings(base: Path, *changes: str) -> RunConfig:
    return parse_config({"base": {"path": str(base)}, "data": {"folder": "x"}}, name="x", overrides=changes)


def answers(base: BaseModel) -> list[torch.Tensor]:
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        text = base.encode_captions(["a red ball", "a blue ball"])
        return [*text.values(), base.predict(latents, torch.tensor([10, 900]), text)]


@pytest.mark.parametrize("form", FORMS)
def test_base_is_bitwise_unchanged_after_an_adapter(tiny_base: Path, form: list[str]) -> None:
    bases, config = BasePool(), settings(tiny_base, "lora.rank=4", *form)
    base = bases(config, CPU, torch.float32)
    adapter = make_adapter(config, base)
    changed = answers(base)  # makes the hooks run
    optimizer = torch.optim.SGD(adapter.parameters(), lr=10.0)
    text = base.encode_captions(["a red ball"])
    base.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), text).square().sum().backward()
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(answers(base), changed, strict=True)), "nothing was trained"
    adapter.remove()
    again = bases(config, CPU, torch.float32)
    assert again is base
    fresh = load_base(str(tiny_base), device=CPU, dtype=torch.float32)
    for ours, theirs in zip((base.network, *base.text_encoders), (fresh.network, *fresh.text_encoders), strict=True):
        kept, untouched = ours.state_dict(), theirs.state_dict()
        assert kept.keys() == untouched.keys()
        assert all(torch.equal(kept[name], untouched[name]) for name in untouched)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(answers(base), answers(fresh), strict=True))


def test_base_with_leftovers_of_an_adapter_is_reloaded(tiny_base: Path) -> None:
    bases, config = BasePool(), settings(tiny_base)
    base = bases(config, CPU, torch.float32)
    make_adapter(config, base)
    assert bases(config, CPU, torch.float32) is not base
    second = bases(config, CPU, torch.float32)
    second.network.register_forward_hook(lambda *_: None)
    assert bases(config, CPU, torch.float32) is not second


def test_other_precision_or_base_is_loaded(tiny_base: Path) -> None:
    bases = BasePool()
    first = bases(settings(tiny_base), CPU, torch.float32)
    assert bases(settings(tiny_base, "lora.rank=2"), CPU, torch.float32) is first
    other = bases(settings(tiny_base), CPU, torch.bfloat16)
    assert other is not first and other.network.dtype == torch.bfloat16


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("sdlora.run.run.prepare", "base.quantization = 'int8'"),
        ("sdlora.cache.tensors.Cache.fill_moments", "data.resolution_px = 24 (now 32"),
        ("sdlora.training.loss.diffusion_loss", "--resume --set train.auto_batch=true"),
        ("sdlora.run.epoch_end.export_epoch", "base.quantization = 'int8'"),
        ("sdlora.previews.sampler._draw", "--resume --set preview.enabled=false"),
        ("sdlora.training.loss.diffusion_loss", "--resume --set train.auto_batch=true"),
    ],
)
def test_out_of_memory_in_a_stage_gives_its_hints(
    function: str, told: str, tmp_path: Path, overrides: list[str], others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("", encoding="utf-8")
    config = load_config(str(source), [*overrides, "train.epochs=1", f"data.validation_folder={others}"])
    monkeypatch.setattr(function, full)
    with pytest.raises(OutOfMemoryError) as caught:
        list(start(config, tmp_path / "run"))
    assert told in str(caught.value)
    if function != "sdlora.run.run.prepare":
        state = json.loads((tmp_path / "run" / "state.json").read_text())
        assert (state["status"], state["error"]) == ("failed", str(caught.value))
        assert "CUDA out of memory." in (tmp_path / "run" / "log.txt").read_text()


def test_diverged_message_names_the_last_good_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "hero")
    assert "It broke. No epoch" in diverged_message("It broke.", folder)
    for epoch in (1, 2):
        folder.epoch(epoch).mkdir(parents=True)
        folder.epoch_lora(epoch).touch()
    assert diverged_message("It broke.", folder).endswith(f"{folder.epoch_lora(2)}.")


def test_settings_for_another_family_are_refused_with_the_presets_that_fit(
    tiny_base: Path, overrides: list[str]
) -> None:
    config = load_config("quickstart", [*overrides, "base.family=pocket"])
    with pytest.raises(ConfigError, match=r"base\.family = 'pocket'.*sd15-character.*--force"):
        fresh_base(config, torch.device("cpu"), torch.float32)
    config = load_config("sdxl-style", ["data.folder=x"])
    with pytest.raises(ConfigError, match=r"base\.family = 'sdxl'.*quickstart"):
        fresh_base(config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["any", "sd1"])
def test_settings_for_the_family_or_for_any_are_taken(family: str, overrides: list[str]) -> None:
    config = load_config("quickstart", [*overrides, f"base.family={family}"])
    assert fresh_base(config, torch.device("cpu"), torch.float32).architecture == "stable-diffusion-v1"
