"""Previews: what is drawn, with which sampler and size, and the sheet of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from sdlora.events import PreviewsDone, Progress
from sdlora.models.load import LoadOptions, load_base
from sdlora.previews.sampler import PreviewRequest, contact_sheet, draw, draw_epoch


def test_previews_equal_the_pipelines_images_and_touch_no_global_state(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    request = PreviewRequest(("a red cat", "a dog"), (3, 4), "blue", 2, 5.0, sampler="base")
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    *progress, done = draw_epoch(base, request, 2, tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert isinstance(progress[-1], Progress) and progress[-1].done == progress[-1].total == 4
    files = sorted((tmp_path / "previews").iterdir())
    assert [path.name for path in files] == sorted(request.file_names())
    assert isinstance(done, PreviewsDone) and done.epoch == 2 and sorted(done.files) == [str(path) for path in files]
    pipeline = base.fresh_pipeline()
    result = pipeline(
        ["a dog"], negative_prompt=["blue"], num_inference_steps=2, guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(3)],
    )  # fmt: skip
    found = Image.open(tmp_path / "previews" / "prompt01_seed3.png")
    difference = (torch.tensor(list(found.tobytes())) - torch.tensor(list(result.images[0].tobytes()))).abs().max()
    assert difference <= 1


def test_request_lists_captions_first_with_their_kinds() -> None:
    request = PreviewRequest(("zumi in a wood", "zumi at sea"), (3, 4), "", 2, 5.0, num_captions=1)
    assert request.wanted() == [("zumi in a wood", 3), ("zumi in a wood", 4), ("zumi at sea", 3), ("zumi at sea", 4)]
    assert request.kinds() == ["training", "training", "novel", "novel"]


def test_contact_sheet_places_every_preview(tmp_path: Path) -> None:
    colors = {("base", 0): "red", ("base", 1): "lime", ("epoch 1", 0): "blue", ("epoch 1", 1): "yellow"}
    files: dict[str, list[Path]] = {"base": [], "epoch 1": []}
    for (column, row), color in colors.items():
        path = tmp_path / f"{column}{row}.png"
        Image.new("RGB", (64, 64), color).save(path)
        files[column].append(path)
    contact_sheet(
        ["one prompt", "another, which is long enough to need several lines"], list(files.items()), tmp_path / "s.png"
    )
    sheet = Image.open(tmp_path / "s.png").convert("RGB")
    step = 134
    found = [[sheet.getpixel((200 + 64 + c * step, 34 + 64 + r * step)) for c in range(2)] for r in range(2)]
    assert found == [[(255, 0, 0), (0, 0, 255)], [(0, 255, 0), (255, 255, 0)]]


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("euler", EulerDiscreteScheduler),
        ("euler_a", EulerAncestralDiscreteScheduler),
        ("auto", partial(DPMSolverMultistepScheduler, use_karras_sigmas=True)),
        ("dpmpp_2m_karras", partial(DPMSolverMultistepScheduler, use_karras_sigmas=True)),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_sampler_and_size_are_those_of_diffusers(
    name: str, scheduler: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    request = PreviewRequest(("a dog",), (3,), "", 4, 5.0, sampler=name, size_px=(48, base.resolution_px))
    list(draw_epoch(base, request, 1, tmp_path))
    pipeline = base.fresh_pipeline()
    own = pipeline.scheduler.config
    kept = {key: own[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")}
    pipeline.scheduler = scheduler(num_train_timesteps=1000, steps_offset=own.get("steps_offset", 0), **kept)
    result = pipeline(
        ["a dog"], negative_prompt=[""], num_inference_steps=4, guidance_scale=5.0, width=48, height=base.resolution_px,
        generator=[torch.Generator().manual_seed(3)],
    )  # fmt: skip
    found = Image.open(tmp_path / "previews" / "prompt00_seed3.png")
    assert found.size == (48, base.resolution_px)
    difference = torch.tensor(list(found.tobytes())) - torch.tensor(list(result.images[0].tobytes()))
    assert difference.abs().max() <= 1
    own_kind = type(base.fresh_pipeline().scheduler)
    with base.pipeline() as after:
        assert type(after.scheduler) is own_kind


def test_contact_sheet_keeps_the_shape_of_previews(tmp_path: Path) -> None:
    Image.new("RGB", (64, 128), "red").save(tmp_path / "tall.png")
    contact_sheet(["tall"], [("base", [tmp_path / "tall.png"])], tmp_path / "s.png")
    sheet = Image.open(tmp_path / "s.png").convert("RGB")
    row = [sheet.getpixel((200 + x, 34 + 64)) == (255, 0, 0) for x in range(128)]
    assert row == [32 <= x < 96 for x in range(128)]


def test_more_previews_have_the_same_prompts_and_other_seeds() -> None:
    request = PreviewRequest(("a", "b", "c"), (0, 7), "", 2, 1.0, num_captions=1)
    more = request.more(24)
    assert more.prompts == request.prompts and more.num_captions == 1
    assert not set(more.seeds) & set(request.seeds)
    assert len(request.wanted()) + len(more.wanted()) == 24
    assert len(request.more(10).wanted()) == 6


def test_auto_keeps_the_models_own_sampler_where_noise_ends_in_pure_noise(tiny_base: Path) -> None:
    options = LoadOptions(prediction_type="v_prediction")
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32, options=options)
    base.use_zero_terminal_snr()
    own, auto = (
        next(draw(base, PreviewRequest(("a dog",), (3,), "", 3, 5.0, sampler=name), [("a dog", 3)]))[0]
        for name in ("base", "auto")
    )
    assert own.tobytes() == auto.tobytes()
