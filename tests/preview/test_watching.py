from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import trained
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from sdlora.lora.inject import Adapter
from sdlora.models.load import load_base
from sdlora.preview import sampler
from sdlora.preview.sampler import PreviewRequest, draw_previews
from sdlora.preview.watching import SamplerWatch


class Stub(nn.Module):
    """Answers `gain` times the sum of what it is asked at and the mean of the text; plainly, `gain` is 1."""

    gain = 1.0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.gain * (sample + encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1) + timestep.view(-1)[0]),)


class Switch:
    """An adapter that triples the stub's answers."""

    def __init__(self, unet: Stub) -> None:
        self.unet = unet
        unet.gain = 3.0

    def disabled(self) -> Any:
        switch = self

        class Off:
            def __enter__(self) -> None:
                switch.unet.gain = 1.0

            def __exit__(self, *_: object) -> None:
                switch.unet.gain = 3.0

        return Off()


def stubbed() -> tuple[SamplerWatch, Stub]:
    unet = Stub()
    base: Any = SimpleNamespace(unet=unet)
    adapter: Any = Switch(unet)
    return SamplerWatch(base, adapter), unet


def test_norms_and_distances_are_the_formulas_own() -> None:
    watch, unet = stubbed()
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(5, 4, 4, 3, 3, generator=generator)
    text = torch.randn(5, 4, 7, 2, generator=generator)
    with watch.batch(2):
        for sample, states, timestep in zip(samples, text, (900, 700, 700, 400, 20), strict=True):
            unet(sample, torch.tensor(timestep), encoder_hidden_states=states)
    answers = 3.0 * (samples.double() + text.double().mean(dim=(2, 3)).view(5, 4, 1, 1, 1))
    pulled = (answers[:, 2:] - answers[:, :2]).pow(2).mean(dim=(2, 3, 4)).sqrt().mean(dim=0)
    assert watch.guidance_norms == pytest.approx(pulled.tolist(), rel=1e-5)
    # Three times an answer minus that answer is twice it, at the last call and for the captions alone.
    last = 2.0 * (answers[-1, 2:] / 3.0 + 20)
    assert watch.base_distances == pytest.approx(last.pow(2).mean(dim=(1, 2, 3)).tolist(), rel=1e-5)
    assert unet.gain == 3.0
    assert not unet._forward_hooks


def test_without_guidance_only_the_distance_is_there() -> None:
    watch, unet = stubbed()
    sample, states = torch.ones(2, 4, 3, 3), torch.zeros(2, 7, 2)
    with watch.batch(2):
        unet(sample, torch.tensor([3, 3]), states)
    assert watch.guidance_norms == []
    assert watch.base_distances == pytest.approx([64.0, 64.0])


def test_what_fails_while_drawing_is_passed_on_and_leaves_no_hook() -> None:
    watch, unet = stubbed()
    with pytest.raises(RuntimeError, match="torn"), watch.batch(1):
        raise RuntimeError("torn")
    assert not unet._forward_hooks
    assert watch.base_distances == []


def drawn(
    tiny_base: Path,
    folder: Path,
    *,
    guidance: float = 5.0,
    scheduler: Callable[[Any], Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[SamplerWatch, Any, Adapter]:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=dtype)
    if scheduler is not None:
        base._pipeline.scheduler = scheduler(base._pipeline.scheduler.config)  # type: ignore[attr-defined]
    adapter = trained(base.unet)
    watch = SamplerWatch(base, adapter)
    request = PreviewRequest(("a red cat", "a dog", "a blue fish"), (3, 4), "green", 5, guidance)
    list(draw_previews(base, request, folder, watch))
    return watch, base, adapter


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("scheduler", [None, PNDMScheduler.from_config, HeunDiscreteScheduler.from_config])
def test_numbers_do_not_depend_on_how_previews_are_batched(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guidance: float,
    scheduler: Callable[[Any], Any] | None,
) -> None:
    together, _, _ = drawn(tiny_base, tmp_path, guidance=guidance, scheduler=scheduler)
    monkeypatch.setattr(sampler, "_PIXELS_PER_BATCH", 4 * 32 * 32)
    apart, _, _ = drawn(tiny_base, tmp_path, guidance=guidance, scheduler=scheduler)
    assert len(together.base_distances) == 6
    assert together.base_distances == pytest.approx(apart.base_distances, rel=1e-3)
    assert together.guidance_norms == pytest.approx(apart.guidance_norms, rel=1e-3)
    assert len(together.guidance_norms) == (6 if guidance > 1 else 0)
    assert min(together.base_distances) > 0


def test_previews_are_watched_in_their_own_order(tiny_base: Path, tmp_path: Path) -> None:
    watch, base, adapter = drawn(tiny_base, tmp_path)
    one = SamplerWatch(base, adapter)
    list(draw_previews(base, PreviewRequest(("a dog",), (4,), "green", 5, 5.0), tmp_path, one))
    assert one.base_distances == pytest.approx([watch.base_distances[3]], rel=1e-3)
    assert one.guidance_norms == pytest.approx([watch.guidance_norms[3]], rel=1e-3)


def test_a_base_in_half_precision_is_watched_in_full(tiny_base: Path, tmp_path: Path) -> None:
    full, _, _ = drawn(tiny_base, tmp_path)
    half, _, _ = drawn(tiny_base, tmp_path, dtype=torch.bfloat16)
    assert half.base_distances == pytest.approx(full.base_distances, rel=0.3)
    assert half.guidance_norms == pytest.approx(full.guidance_norms, rel=0.3)


def test_watching_changes_no_picture_and_leaves_everything_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = trained(base.unet)
    first = next(iter(adapter.layers.values()))
    first.enabled = False
    base.unet.train()
    request = PreviewRequest(("a red cat",), (3, 4), "", 2, 5.0)
    list(draw_previews(base, request, tmp_path / "alone"))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    list(draw_previews(base, request, tmp_path / "watched", SamplerWatch(base, adapter)))
    assert torch.equal(torch.rand(2), expected)
    for name in request.file_names():
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()
    assert base.unet.training
    assert not base.unet._forward_hooks
    assert not base.unet._forward_pre_hooks
    assert [layer.enabled for layer in adapter.layers.values()] == [False] + [True] * (len(adapter.layers) - 1)
