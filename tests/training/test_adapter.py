from pathlib import Path

import torch
from helpers.adapters import UNET_TARGETS

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.lora.targets import target_of
from sdlora.models.load import load_base
from sdlora.run.arguments import Arguments
from sdlora.training.adapter import make_adapter


def test_every_setting_reaches_the_layers(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    lora = LoraConfig(
        rank=4, alpha=2.0, targets=[*UNET_TARGETS, "text_encoder"], target_ranks={"mlp": 3}, target_alphas={"conv": 6},
        rslora=True, dropout=0.25, init="pissa", timestep_rank_min=2,
    )  # fmt: skip
    adapter = make_adapter(Arguments(RunConfig(lora=lora)).adapter, base)
    for path, layer in adapter.layers.items():
        assert layer.rank == (3 if target_of(path) == "mlp" else 4)
        assert abs(layer.scale - (6 if target_of(path) == "conv" else 2) / layer.rank**0.5) < 1e-6
        assert layer.dropout == 0.25
        assert layer.initial is not None
    base.predict(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), {"states": torch.zeros(2, 77, 16)})
    masks = [layer.rank_mask for path, layer in adapter.layers.items() if target_of(path) != "text_encoder"]
    assert {tuple(mask.sum(1).tolist()) for mask in masks if mask is not None} == {(4.0, 2.0), (3.0, 2.0)}
