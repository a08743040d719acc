"""Ranks and layers that are left out, and the limit of norms, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.adapters import LINEAR_TARGETS, UNET_TARGETS, injected, outputs

from sdlora.lora.inject import AdapterSpec
from sdlora.lora.limits import kept_ranks, limit_norms

EXPOSURES = [("a", 1), ("b", 1)]


@pytest.mark.parametrize("targets", [LINEAR_TARGETS, UNET_TARGETS])
def test_ranks_that_are_left_out_are_those_of_smaller_factors(pipeline: Any, targets: list[str]) -> None:
    adapter = injected(pipeline, targets, AdapterSpec(rank_dropout=0.5))
    exposures = [EXPOSURES[0]] * 2  # both samples alike, so that the layers' own weights can say it
    with adapter.dropping(7, exposures):
        found = outputs(pipeline.unet)
    assert all(layer.kept_ranks is None for layer in adapter.layers.values())
    plain = outputs(pipeline.unet)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            factors = kept_ranks(layer, 7, path, EXPOSURES[0])
            assert set(factors.tolist()) <= {0.0, 2.0}
            layer.down.mul_(factors.view(-1, *(1 for _ in layer.down.shape[1:])))
    torch.testing.assert_close(found, outputs(pipeline.unet), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_layers_that_are_left_out_are_the_base_models(pipeline: Any, init: Any) -> None:
    adapter = injected(pipeline, LINEAR_TARGETS, AdapterSpec(module_dropout=0.5, init=init))
    with adapter.dropping(7, [EXPOSURES[1]] * 2):
        found = outputs(pipeline.unet)
    out = [path for path, layer in adapter.layers.items() if not kept_ranks(layer, 7, path, EXPOSURES[1]).any()]
    assert 10 <= len(out) <= 30
    for path in out:
        adapter.layers[path].enabled = False
    torch.testing.assert_close(found, outputs(pipeline.unet), rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_a_function_of_the_exposure(pipeline: Any) -> None:
    adapter = injected(pipeline, LINEAR_TARGETS, AdapterSpec(rank_dropout=0.3, module_dropout=0.3))
    with adapter.dropping(7, EXPOSURES):
        both = outputs(pipeline.unet)
    with adapter.dropping(7, EXPOSURES[::-1]):
        assert not torch.equal(both, outputs(pipeline.unet))
    with adapter.dropping(7, EXPOSURES):
        assert torch.equal(both, outputs(pipeline.unet))


def test_norms_above_the_limit_are_shrunk_to_it(pipeline: Any) -> None:
    adapter = injected(pipeline, UNET_TARGETS, AdapterSpec(target_alphas={"conv": 9.0}))
    before = {path: (layer.down.double().clone(), layer.up.double().clone()) for path, layer in adapter.layers.items()}
    limit_norms(adapter.layers.values(), 0.5)
    shrunk = 0
    for path, layer in adapter.layers.items():
        down, up = before[path]
        norm = float((layer.scale * up.flatten(1) @ down.flatten(1)).detach().norm())
        factor = min(1.0, 0.5 / norm) ** 0.5
        shrunk += factor < 1
        torch.testing.assert_close(layer.down.double(), down * factor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.up.double(), up * factor, rtol=1e-5, atol=1e-7)
    assert shrunk > 0
