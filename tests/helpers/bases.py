"""Loading base models in tests, and the reasons for refusing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ldm import Tensors

from sdlora.common.families import Family
from sdlora.errors import BaseModelError
from sdlora.models.base import BaseModel
from sdlora.models.load import LoadOptions, load_base

CPU = torch.device("cpu")
FAMILIES: list[Family] = ["sd1", "sd2", "sdxl"]
NAMES = {
    "sd1": ("stable-diffusion-v1", "epsilon"),
    "sd2": ("stable-diffusion-v2-768-v", "v_prediction"),
    "sdxl": ("stable-diffusion-xl-v1-base", "epsilon"),
}
"""The ModelSpec name and the prediction type of every family's tiny base."""
CAPTIONS = ["a cat", "zumi by the sea"]

Layouts = dict[Family, Tensors]
"""A family's tiny checkpoint in its authors' layout."""


def load(path: Path | str, *, dtype: torch.dtype = torch.float32, **options: Any) -> BaseModel:
    return load_base(str(path), device=CPU, dtype=dtype, options=LoadOptions(**options))


def refused(path: Path | str, **options: Any) -> str:
    """The reason why a base model is refused."""
    with pytest.raises(BaseModelError) as caught:
        load(path, **options)
    return str(caught.value)
