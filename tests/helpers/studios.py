"""Runs and images as a trainer and an artist leave them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from PIL import Image

from sdlora.common.families import Family
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml
from sdlora.models.architectures import ARCHITECTURES
from sdlora.ui.state.folders import Studio


def write_state(studio: Studio, config: RunConfig, **state: Any) -> Path:
    """A run's folder with its settings and its state."""
    folder = studio.run(config.name or "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(dump_toml(config), encoding="utf-8")
    whole = {
        "status": "running", "phase": "train", "epoch": 1, "step": 3, "total_steps": 10, "done": 3, "total": 10,
        "eta_seconds": 7.0, "pid": 0, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "error": None,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(whole | state), encoding="utf-8")
    return folder


def write_image(path: Path, color: str = "red", size: tuple[int, int] = (48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)
    return path


def write_base(folder: Path, family: str, prediction_type: str) -> Path:
    """The folder of a base model of a family's true shape, in diffusers' layout and without weights."""
    if family == "z-image":
        for part, entries in {
            "transformer": {"_class_name": "ZImageTransformer2DModel"},
            "scheduler": {"shift": 6.0},
        }.items():
            (folder / part).mkdir(parents=True)
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / name).write_text(json.dumps(entries), encoding="utf-8")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}), encoding="utf-8")
        return folder
    shape = ARCHITECTURES[cast(Family, family)]
    encoders = {f"text_encoder{'_2' * n}": config for n, config in enumerate(shape.text_encoders)}
    for part, config in {"unet": shape.unet, "vae": shape.vae, **encoders}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction_type}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": shape.pipeline}), encoding="utf-8")
    return folder


def auth_file(folder: Path, line: str = "me:correct horse", mode: int = 0o600) -> Path:
    """A file with an account of the studio."""
    file = folder / "auth"
    file.write_text(line, encoding="utf-8")
    file.chmod(mode)
    return file
