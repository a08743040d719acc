from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapters import trained
from diffusers import StableDiffusionPipeline

from sdlora.lora.inject import LoraState


@pytest.fixture
def pipeline(tiny_base: Path) -> Any:
    """The tiny base as any diffusers user loads it."""
    return StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)


@pytest.fixture
def unet(pipeline: Any) -> Any:
    return pipeline.unet


@pytest.fixture
def state(unet: Any) -> LoraState:
    adapter = trained(unet)
    adapter.remove()
    return adapter.state()
