"""Starting points: what a first run asks of an artist, and the settings that follow from the answers.

Pure. They are places to begin at and are shown in the form, where each can be changed.
"""

from __future__ import annotations

from typing import Any

from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config

from .form import to_values

SUBJECTS: dict[str, dict[str, Any]] = {
    "character": {"lora.rank": 16, "lora.alpha": 16.0},
    "style": {"lora.rank": 16, "lora.alpha": 16.0, "lora.targets": ["cross_attention", "self_attention"]},
    "object": {"lora.rank": 8, "lora.alpha": 8.0},
}
"""What is taught: options by kind of subject, on a base of ordinary size."""

LENGTHS: dict[str, tuple[int, int]] = {"a first look": (2, 12), "as usual": (4, 36), "thorough": (5, 50)}
"""How long to train: epochs, and repeats in each."""

FITTED: dict[str, Any] = {
    "train.precision": "auto", "train.gradient_accumulation_steps": 1, "train.gradient_checkpointing": False,
    "base.quantization": "none", "data.resolution_px": None,
}  # fmt: skip
"""What is changed where memory is short, beside the batch size, as it is where there is enough."""

_OF_POCKET = (
    "lora.rank", "lora.alpha", "lora.targets", "train.batch_size", "train.learning_rate", "train.lr_schedule",
    "preview.guidance",
)  # fmt: skip


def recipe(subject: str, length: str, base: str) -> dict[str, Any]:
    """The options that three answers stand for; all others stay as they are.

    Args:
        subject: A key of `SUBJECTS`.
        length: A key of `LENGTHS`.
        base: base.path.
    """
    epochs, repeats = LENGTHS[length]
    values = {name: to_values(RunConfig())[name] for name in _OF_POCKET} | SUBJECTS[subject]
    if base == "pocket":
        # It is small: what suits larger bases teaches it nothing.
        measured = to_values(load_config("quickstart"))
        values = {name: measured[name] for name in _OF_POCKET}
    return values | FITTED | {"base.path": base, "train.epochs": epochs, "data.repeats": repeats}
