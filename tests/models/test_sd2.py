"""Stable Diffusion 2.x reads the second to last layer of its text encoder and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.bases import CAPTIONS, load

from sdlora.common.families import Family
from sdlora.errors import ConfigError
from sdlora.models.base import TextOptions


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_clip_skip_other_than_two_is_refused(family: Family, folders: dict[Family, Path]) -> None:
    assert torch.equal(
        load(folders[family], text=TextOptions(clip_skip=2)).encode_captions(CAPTIONS)["states"],
        load(folders[family]).encode_captions(CAPTIONS)["states"],
    )
    with pytest.raises(ConfigError, match=r"clip_skip is 1"):
        load(folders[family], text=TextOptions(clip_skip=1))
    with pytest.raises(ConfigError, match=r"clip_skip is 3.* 2 layers"):
        load(folders["sd1"], text=TextOptions(clip_skip=3))
