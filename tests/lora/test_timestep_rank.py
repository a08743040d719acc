import math
from typing import Any

import pytest
import torch
from helpers.adapters import LINEAR_TARGETS, UNET_TARGETS, injected
from torch import nn

from sdlora.diffusion.flow import resolution_shift
from sdlora.diffusion.timesteps import Density, Draw
from sdlora.errors import DataError
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.timestep_rank import (
    TimestepRank,
    active_ranks,
    quantiles_of,
    rank_mask,
    timestep_rank_in,
    timestep_rank_metadata,
    watch_timesteps,
)

SETTING = TimestepRank(2, 1.5)


@pytest.mark.parametrize(("rank", "lowest", "alpha"), [(8, 1, 1.0), (64, 32, 1.0), (16, 4, 0.5), (5, 5, 2.0)])
def test_active_ranks_equal_equation_5(rank: int, lowest: int, alpha: float) -> None:
    found = active_ranks(torch.arange(1000), rank, TimestepRank(lowest, alpha))
    expected = [math.floor(((1000 - t) / 1000) ** alpha * (rank - lowest)) + lowest for t in range(1000)]
    assert found.tolist() == expected
    assert (found[0].item(), found[999].item()) == (rank, lowest)


def test_mask_keeps_the_first_ranks() -> None:
    mask = rank_mask(torch.tensor([0, 500, 999]), 4, TimestepRank(1, 1.0))
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


def output(pipeline: Any, timesteps: list[int], samples: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 4, 8, 8, generator=generator)[samples]
    text = torch.randn(3, 77, 16, generator=generator)[samples]
    found: torch.Tensor = pipeline.unet(latents, torch.tensor(timesteps), text, return_dict=False)[0]
    return found


@torch.no_grad()
@pytest.mark.parametrize("targets", [LINEAR_TARGETS, UNET_TARGETS])
@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_each_sample_has_the_mask_of_its_timestep(pipeline: Any, targets: list[str], init: Any) -> None:
    adapter = injected(pipeline, targets, AdapterSpec(timestep_rank=SETTING, init=init), rank=8)
    together = output(pipeline, [0, 480, 990], [0, 1, 2])
    alone = torch.cat([output(pipeline, [t], [i]) for i, t in enumerate([0, 480, 990])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    one_for_all = output(pipeline, [480], [0, 1, 2])
    torch.testing.assert_close(one_for_all[1], together[1], atol=1e-5, rtol=1e-5)
    adapter.remove()
    plain = output(pipeline, [0, 480, 990], [0, 1, 2])
    assert (together - plain).abs().flatten(1).amax(1).min() > 1e-3


@torch.no_grad()
def test_mask_equals_cutting_ranks_off(pipeline: Any) -> None:
    timestep = 480
    adapter = injected(pipeline, LINEAR_TARGETS, AdapterSpec(timestep_rank=SETTING), rank=8)
    masked = output(pipeline, [timestep], [0])
    adapter.remove()
    adapter = injected(pipeline, LINEAR_TARGETS, AdapterSpec(), rank=8)
    assert not torch.allclose(output(pipeline, [timestep], [0]), masked, atol=1e-4)
    kept = math.floor(0.52**1.5 * 6) + 2
    for layer in adapter.layers.values():
        layer.up[:, kept:] = 0
    torch.testing.assert_close(output(pipeline, [timestep], [0]), masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_encoder_has_no_mask(pipeline: Any) -> None:
    adapter = injected(pipeline, ["text_encoder", "cross_attention"], AdapterSpec(timestep_rank=SETTING), rank=8)
    tokens = torch.arange(77)[None]
    before = pipeline.text_encoder(tokens).last_hidden_state
    output(pipeline, [990], [0])
    assert torch.equal(pipeline.text_encoder(tokens).last_hidden_state, before)
    adapter.remove()


@torch.no_grad()
def test_removed_adapter_no_longer_sets_masks(pipeline: Any) -> None:
    adapter = injected(pipeline, ["cross_attention"], AdapterSpec(timestep_rank=SETTING), rank=8)
    adapter.remove()
    output(pipeline, [990], [0])
    assert all(layer.rank_mask is None for layer in adapter.layers.values())


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_shifted_density_trains_each_rank_in_the_share_of_its_quantile(size: int, alpha: float) -> None:
    shift = resolution_shift((size // 16) ** 2, (256, 0.5), (4096, 1.15))
    density = Density("logit_normal", log_shift=shift)
    setting = TimestepRank(2, alpha, "noise share", quantiles_of(density.edges))
    steps = 20_000
    timesteps = torch.tensor([density.timestep(Draw(i, steps, 0.5)) for i in range(steps)])
    trained = rank_mask(timesteps, 16, setting).mean(0)
    shares = [1.0, 1.0, *(1 - ((j + 1 - 2) / 14) ** (1 / alpha) for j in range(2, 16))]
    assert trained.tolist() == pytest.approx(shares, abs=0.01)
    # By the timestep itself the higher ranks would see less.
    starved = rank_mask(timesteps, 16, TimestepRank(2, alpha)).mean(0)
    assert starved[8] < 0.95 * trained[8]


def test_quantiles_of_the_uniform_density_are_timesteps() -> None:
    uniform = TimestepRank(1, 1.0, "noise share", quantiles_of(Density("uniform").edges))
    timesteps = torch.arange(0, 1000, 10) + 5
    assert torch.equal(active_ranks(timesteps, 8, uniform), active_ranks(timesteps, 8, TimestepRank(1, 1.0)))
    limited = quantiles_of(Density("uniform", minimum=200, maximum=599).edges)
    assert (limited[0], limited[50], limited[100]) == (200.0, 400.0, 600.0)


class Told(nn.Module):
    """Called as a transformer."""

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, more: int = 0) -> None:
        """Nothing."""


def test_what_a_network_is_told_becomes_timesteps() -> None:
    seen: list[Any] = []
    for told, given in {"noise share": [0.001, 0.5, 1.0], "image share": [0.999, 0.5, 0.0]}.items():
        network = Told()
        watch_timesteps(network, lambda found: seen.append(found.tolist()), told)  # type: ignore[arg-type]
        sample = [torch.zeros(1)] * 3
        network(sample, torch.tensor(given))
        network(x=sample, t=torch.tensor(given))
        network(sample, t=torch.tensor(given[1]))
    assert seen == [[0, 499, 999], [0, 499, 999], [499, 499, 499]] * 2


def test_files_say_at_which_noise_ranks_were_trained() -> None:
    setting = TimestepRank(2, 0.5, "image share", (0.0, 700.5, 1000.0))
    assert timestep_rank_in(timestep_rank_metadata(setting), "file") == setting
    assert timestep_rank_in(timestep_rank_metadata(SETTING), "file") == SETTING
    written = timestep_rank_metadata(setting)
    for key, value in (("told", "x"), ("quantiles", "[1, 0]"), ("quantiles", "[5]"), ("quantiles", "{")):
        with pytest.raises(DataError):
            timestep_rank_in(written | {f"sdlora.timestep_rank_{key}": value}, "file")
