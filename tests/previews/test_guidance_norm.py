from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from helpers.adapters import trained
from torch import Tensor, nn

from sdlora.models.load import load_base
from sdlora.previews import sampler
from sdlora.previews.sampler import PreviewRequest, SamplerWatch, draw_epoch


class Stub(nn.Module):
    """Answers the sum of what it is asked at, the mean of the text and the timestep."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return (sample + encoder_hidden_states.mean(dim=(1, 2)).view(-1, *(1,) * (sample.dim() - 1)) + timestep,)


def stubbed() -> tuple[SamplerWatch, Stub]:
    unet = Stub()
    base: Any = SimpleNamespace(network=unet)
    return SamplerWatch(base), unet


def test_guidance_norms_equal_the_formula() -> None:
    watch, unet = stubbed()
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 4, 4, 3, 3, generator=generator)
    text = torch.randn(5, 4, 7, 2, generator=generator)
    with watch.batch(2):
        for sample, states, timestep in zip(samples, text, (900, 700, 700, 400, 20), strict=True):
            unet(sample, torch.tensor(timestep), encoder_hidden_states=states)
    answers = samples.double() + text.double().mean(dim=(2, 3)).view(5, 4, 1, 1, 1)
    pulled = (answers[:, 2:] - answers[:, :2]).pow(2).mean(dim=(2, 3, 4)).sqrt().mean(dim=0)
    assert watch.guidance_norms == pytest.approx(pulled.tolist(), rel=1e-4)
    assert not unet._forward_hooks


def test_pairs_that_are_predicted_in_turns_have_the_same_norms() -> None:
    watch, unet = stubbed()
    with watch.batch(2):
        for timestep in (900, 20):
            for pulled in (3.0, 1.0):
                unet(torch.ones(2, 5, 3), torch.tensor(timestep), torch.full((2, 7, 2), pulled))
    assert watch.guidance_norms == pytest.approx([2.0, 2.0])


def test_without_guidance_there_are_no_norms() -> None:
    watch, unet = stubbed()
    with watch.batch(2, guided=False):
        for timestep in (900, 20):
            unet(torch.ones(2, 4, 3, 3), torch.tensor(timestep), torch.zeros(2, 7, 2))
    assert watch.guidance_norms == []


def test_failure_while_drawing_is_raised_and_leaves_no_hook() -> None:
    watch, unet = stubbed()
    with pytest.raises(RuntimeError, match="torn"), watch.batch(1):
        raise RuntimeError("torn")
    assert not unet._forward_hooks
    assert watch.guidance_norms == []


def drawn(
    tiny_base: Path,
    folder: Path,
    *,
    guidance: float = 5.0,
    scheduler: Callable[[Any], Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[SamplerWatch, Any]:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=dtype)
    if scheduler is not None:
        base._pipeline.scheduler = scheduler(base._pipeline.scheduler.config)  # type: ignore[attr-defined]
    trained(base.network)
    watch = SamplerWatch(base)
    request = PreviewRequest(("a red cat", "a dog", "a blue fish"), (3, 4), "green", 5, guidance)
    list(draw_epoch(base, request, 1, folder, watch))
    return watch, base


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("scheduler", [None, PNDMScheduler.from_config, HeunDiscreteScheduler.from_config])
def test_norms_do_not_depend_on_the_batch_size(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance: float,
    scheduler: Callable[[Any], Any] | None,
) -> None:
    together, _ = drawn(tiny_base, tmp_path, guidance=guidance, scheduler=scheduler)
    monkeypatch.setattr(sampler, "_PIXELS_PER_BATCH", 4 * 32 * 32)
    apart, _ = drawn(tiny_base, tmp_path, guidance=guidance, scheduler=scheduler)
    assert together.guidance_norms == pytest.approx(apart.guidance_norms, rel=1e-3)
    assert len(together.guidance_norms) == (6 if guidance > 1 else 0)


def test_norms_are_in_the_order_of_the_files(tiny_base: Path, tmp_path: Path) -> None:
    watch, base = drawn(tiny_base, tmp_path)
    one = SamplerWatch(base)
    list(draw_epoch(base, PreviewRequest(("a dog",), (4,), "green", 5, 5.0), 1, tmp_path, one))
    assert one.guidance_norms == pytest.approx([watch.guidance_norms[3]], rel=1e-3)


def test_norms_of_a_half_precision_base_are_float32(tiny_base: Path, tmp_path: Path) -> None:
    full, _ = drawn(tiny_base, tmp_path)
    half, _ = drawn(tiny_base, tmp_path, dtype=torch.bfloat16)
    assert half.guidance_norms == pytest.approx(full.guidance_norms, rel=0.3)


def test_observing_changes_no_image_and_no_state(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = trained(base.network)
    first = next(iter(adapter.layers.values()))
    first.enabled = False
    base.network.train()
    request = PreviewRequest(("a red cat",), (3, 4), "", 2, 5.0)
    list(draw_epoch(base, request, 1, tmp_path / "alone"))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    list(draw_epoch(base, request, 1, tmp_path / "watched", SamplerWatch(base)))
    assert torch.equal(torch.rand(2), expected)
    for name in request.file_names():
        assert (tmp_path / "alone" / "previews" / name).read_bytes() == (
            tmp_path / "watched" / "previews" / name
        ).read_bytes()
    assert base.network.training
    assert not base.network._forward_hooks
    assert not base.network._forward_pre_hooks
    assert [layer.enabled for layer in adapter.layers.values()] == [False] + [True] * (len(adapter.layers) - 1)
