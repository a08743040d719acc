"""VAE and text encoders take turns on the device: what waits is made of NaN here, so that no one uses it unnoticed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, ZImageTransformer2DModel
from helpers.tiny import make_tiny_z_image
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3Model

from sdlora.config.schema import BaseConfig, LoraConfig, RunConfig, Target
from sdlora.config.toml import load_config
from sdlora.estimate.meta_model import shapes_of_base
from sdlora.models import base as base_model
from sdlora.models.load import load_base
from sdlora.run.arguments import make_adapter
from sdlora.run.run import start
from sdlora.run.setup import BasePool

AWAY = torch.device("meta")
KEPT_TEXT, LIVE_TEXT, TRAINED_TEXT = "cache.max_text_gib=2", "cache.max_text_gib=0", 'lora.targets=["text_encoder"]'


class Waiting:
    """Stands in for moves between devices: networks that wait lose their numbers until they come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: dict[nn.Module, list[torch.Tensor]] = {}
        self.known: set[nn.Module] = set()
        self.seen: list[set[str]] = []
        monkeypatch.setattr(base_model, "_ASIDE", AWAY)
        monkeypatch.setattr(base_model, "move", self.move)
        plain = UNet2DConditionModel.forward

        def watched(unet: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.seen.append(self.present())
            return plain(unet, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", watched)

    def present(self) -> set[str]:
        return {type(network).__name__ for network in self.known - self.kept.keys()}

    @torch.no_grad()
    def move(self, network: nn.Module, device: torch.device) -> None:
        self.known.add(network)
        if device == AWAY and network not in self.kept:
            self.kept[network] = [parameter.clone() for parameter in network.parameters()]
            for parameter in network.parameters():
                parameter.fill_(torch.nan)
        elif device != AWAY:
            for parameter, numbers in zip(network.parameters(), self.kept.pop(network, ()), strict=False):
                parameter.copy_(numbers)


def outcome(folder: Path, overrides: list[str], *changes: str) -> str:
    """A digest of a run's LoRA and of its images."""
    source = folder.with_suffix(".toml")
    source.write_text("[data]\ntrigger = 'zumi'\n")
    config = load_config(str(source), [*overrides, f"cache.dir={folder}-cache", "preview.seeds=[0,1]", *changes])
    for _ in start(config, folder):
        pass
    (file,), drawn = folder.glob("*.safetensors"), sorted(folder.glob("epochs/*/previews/*.png"))
    assert len(drawn) == 3 * 2
    tensors = [tensor.numpy().tobytes() for _, tensor in sorted(load_file(file).items())]
    return hashlib.sha256(b"".join([*tensors, *(image.read_bytes() for image in drawn)])).hexdigest()


@pytest.mark.parametrize(
    ("change", "present"),
    [(KEPT_TEXT, set[str]()), (LIVE_TEXT, {"CLIPTextModel"}), (TRAINED_TEXT, {"CLIPTextModel"})],
)
def test_a_run_is_the_same_and_steps_have_only_what_they_need(
    change: str, present: set[str], tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = outcome(tmp_path / "plain", overrides, change)
    waiting = Waiting(monkeypatch)
    assert outcome(tmp_path / "turns", overrides, change) == plain
    assert waiting.seen
    assert all(found == present for found in waiting.seen)
    assert {type(network).__name__ for network in waiting.known} == {"AutoencoderKL", "CLIPTextModel"}


def test_never_both_of_them_and_none_in_the_end(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    waiting = Waiting(monkeypatch)
    base.encode_pixels(torch.zeros(1, 3, 32, 32))
    assert waiting.present() == {"AutoencoderKL"}
    assert base.encode_captions(["a cat"])["states"].isfinite().all()
    assert waiting.present() == {"CLIPTextModel"}
    prompts = base.prompt_embeddings(["a cat"], [""])
    with base.pipeline() as pipeline, torch.no_grad():
        assert waiting.present() == {"AutoencoderKL"}
        assert not isinstance(pipeline.text_encoder, nn.Module)
        pipeline(**prompts, num_inference_steps=1)
    assert pipeline.text_encoder is base.text_encoders[0]
    base.offload()
    assert waiting.present() == set()


def test_a_transformer_leaves_while_its_language_model_reads(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_z_image(tmp_path / "base")
    changes = [f"base.path={tmp_path / 'base'}", 'lora.targets=["attention"]', "copycheck.enabled=true"]
    for kept in (KEPT_TEXT, LIVE_TEXT):
        plain = outcome(tmp_path / f"plain {kept[-1]}", overrides, *changes, kept)
        with pytest.MonkeyPatch.context() as patch:
            waiting = Waiting(patch)
            seen = [watched(patch, kind, waiting) for kind in (ZImageTransformer2DModel, Qwen3Model)]
            assert outcome(tmp_path / f"turns {kept[-1]}", overrides, *changes, kept) == plain
        assert {"ZImageTransformer2DModel"} in seen[0]
        assert all("Qwen3Model" not in present for present in seen[0])
        assert seen[1] and all("ZImageTransformer2DModel" not in present for present in seen[1])


def watched(patch: pytest.MonkeyPatch, kind: Any, waiting: Waiting) -> list[set[str]]:
    """What is present whenever a network of the run's base model computes; those that verify files never waited."""
    plain, seen = kind.forward, list[set[str]]()

    def forward(network: Any, *args: Any, **kwargs: Any) -> Any:
        if network in waiting.known:
            seen.append(waiting.present())
        return plain(network, *args, **kwargs)

    patch.setattr(kind, "forward", forward)
    return seen


def test_what_is_trained_stays_where_it_is(tmp_path: Path) -> None:
    make_tiny_z_image(tmp_path)
    base = load_base(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    adapter = make_adapter(RunConfig(lora=LoraConfig(targets=["attention"])), base)
    before = list(adapter.parameters())
    base_model.move(base.network, AWAY)
    trained = {id(parameter) for parameter in before}
    for parameter in base.network.parameters():
        assert (parameter.device == AWAY) != (id(parameter) in trained)
    assert all(a is b for a, b in zip(before, adapter.parameters(), strict=True))


def test_counting_and_naming_move_nothing(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch)
    bases = BasePool()
    base = bases(RunConfig(base=BaseConfig(path=str(tiny_base))), torch.device("cpu"), torch.float32)
    base.offload()
    assert waiting.known and waiting.present() == set()
    targets: list[Target] = ["cross_attention", "text_encoder"]
    assert shapes_of_base(base).text_bytes > 0
    assert bases(RunConfig(base=BaseConfig(path=str(tiny_base))), torch.device("cpu"), torch.float32) is base
    make_adapter(RunConfig(), base).remove()
    assert waiting.present() == set()
    # What is trained must be where it stays, before an optimizer knows it.
    adapter = make_adapter(RunConfig(lora=LoraConfig(targets=targets)), base)
    assert waiting.present() == {"CLIPTextModel"}
    base.offload()
    assert waiting.present() == {"CLIPTextModel"}
    assert all(bool(parameter.isfinite().all()) for parameter in adapter.parameters())


def test_a_network_is_moved_only_where_it_is_not() -> None:
    network, moved = nn.Linear(2, 2), list[Any]()
    network.to = moved.append  # type: ignore[assignment, method-assign]
    base_model.move(network, torch.device("cpu"))
    assert moved == []
    base_model.move(network, AWAY)
    assert moved == [AWAY]
