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
from sdlora.models.families import CLASSES
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
    kind = CLASSES[cast(Family, family)]
    network, vae, encoders = kind.true_configs()
    parts = {
        kind.network_name: {"_class_name": kind.network_class, **network},
        "vae": vae,
        **dict(zip(kind.text_parts, encoders, strict=True)),
    }
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    (folder / "scheduler").mkdir()
    predicts = {"prediction_type": prediction_type} if prediction_type else {"shift": 6.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(predicts))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind.names.pipeline}), encoding="utf-8")
    return folder


def auth_file(folder: Path, line: str = "me:correct horse", mode: int = 0o600) -> Path:
    """A file with an account of the studio."""
    file = folder / "auth"
    file.write_text(line, encoding="utf-8")
    file.chmod(mode)
    return file
