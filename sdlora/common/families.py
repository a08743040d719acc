"""The names of the families of base models, as options take them; `sdlora.models.families` has their classes."""

from __future__ import annotations

from typing import Literal

Family = Literal["sd1", "sd2", "sdxl", "z-image", "flux2-klein-4b", "flux2-klein-9b"]
