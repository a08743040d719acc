"""A kept base is the base: no bit of it changes, and what is left in it makes it load anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.models.base import BaseModel
from sdlora.models.load import load_base
from sdlora.run.arguments import Arguments
from sdlora.run.base_pool import BasePool
from sdlora.training.adapter import make_adapter

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
    adapter = make_adapter(Arguments(config).adapter, base)
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
    for ours, theirs in zip((base.unet, *base.text_encoders), (fresh.unet, *fresh.text_encoders), strict=True):
        kept, untouched = ours.state_dict(), theirs.state_dict()
        assert kept.keys() == untouched.keys()
        assert all(torch.equal(kept[name], untouched[name]) for name in untouched)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(answers(base), answers(fresh), strict=True))


def test_base_with_leftovers_of_an_adapter_is_reloaded(tiny_base: Path) -> None:
    bases, config = BasePool(), settings(tiny_base)
    base = bases(config, CPU, torch.float32)
    make_adapter(Arguments(config).adapter, base)
    assert bases(config, CPU, torch.float32) is not base
    second = bases(config, CPU, torch.float32)
    second.unet.register_forward_hook(lambda *_: None)
    assert bases(config, CPU, torch.float32) is not second


def test_other_precision_or_base_is_loaded(tiny_base: Path) -> None:
    bases = BasePool()
    first = bases(settings(tiny_base), CPU, torch.float32)
    assert bases(settings(tiny_base, "lora.rank=2"), CPU, torch.float32) is first
    other = bases(settings(tiny_base), CPU, torch.bfloat16)
    assert other is not first and other.unet.dtype == torch.bfloat16
