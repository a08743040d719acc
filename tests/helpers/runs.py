"""Runs on a tiny base, and what they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sdlora.config.toml import load_config
from sdlora.copycheck import checker
from sdlora.copycheck.verdict import Match
from sdlora.events import (
    Event,
)
from sdlora.previews.sampler import PreviewRequest
from sdlora.run.run import start

CONFIG = "[data]\ntrigger = 'zumi'\n"


def run(folder: Path, overrides: Sequence[str], **options: object) -> list[Event]:
    source = folder.parent / "hero.toml"
    source.write_text(CONFIG, encoding="utf-8")
    return list(start(load_config(str(source), overrides), folder, **options))  # type: ignore[arg-type]


def metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def without_times(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("epochs/*/previews/*.png"), folder / "previews.png"]
    found = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    for file in folder.glob("epochs/*/adapter.safetensors"):
        # The header holds the time of writing; the tensors follow it.
        content = file.read_bytes()
        body = content[8 + int.from_bytes(content[:8], "little") :]
        found[str(file.relative_to(folder))] = hashlib.sha256(body).hexdigest()
    return found


def copying_from(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the copy check find copies in all previews from an epoch on."""
    real = checker.match_previews

    def match_previews(request: PreviewRequest, folder: Path, *arguments: Any) -> tuple[list[Match], Tensor]:
        matches, found = real(request, folder, *arguments)
        return [replace(match, significant=int(folder.name) >= epoch) for match in matches], found

    monkeypatch.setattr(checker, "match_previews", match_previews)
