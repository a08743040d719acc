"""LoRA files that a run of another trainer starts with: continued, or merged into the base model.

Rules of the tables of several forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from sdlora.config.imports.rules import OFF, Outcome, compute, dropped, number, refused, text, translated

_UNREADABLE = "sdlora reads LoRAs in .safetensors files; convert the file"


def _continued(value: Any) -> Outcome:
    if value in OFF:
        return dropped("off")
    file = text(value)
    if not file.lower().endswith(".safetensors"):
        return refused(_UNREADABLE)
    return translated({"lora.from_file": file}, "with its ranks, alphas and targets")


CONTINUED = compute(lambda value, source: _continued(value), "`lora.from_file`")
"""Training continues from a file."""


def merged(files: Any, weights: Sequence[Any] = ()) -> Outcome:
    """Files that are merged into the base model before training, each at its weight, or at 1 without one."""
    named = [text(file) for file in (files if isinstance(files, list) else [files]) if file not in OFF]
    given = [number(weight) for weight in weights[: len(named)]]
    found = [
        {"file": file, "weight": weight} for file, weight in zip_longest(named, given, fillvalue=1.0) if weight != 0
    ]
    if not found:
        return dropped("off")
    if not all(file.lower().endswith(".safetensors") for file in named):
        return refused(_UNREADABLE)
    return translated({"base.merge": found}, "previews and the copy check are of the merged base model")


MERGED = compute(lambda value, source: merged(value), "`base.merge`")
"""Files that are merged into the base model at full strength."""
