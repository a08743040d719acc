"""Exact resume: the adapter, the optimizer and three counters, written so that a crash never leaves half of them.

Floor 5. A checkpoint is a folder; it counts only once `complete.json`, its last file, is there. No generator states
are kept, because randomness is a function of counters.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdlora.errors import OutputError
from sdlora.files import atomic_path, write_json
from sdlora.training.loop import Position, Trainer

KEPT = 2
_LAST_FILE = "complete.json"


def save_checkpoint(folder: Path, trainer: Trainer, extra: dict[str, Any]) -> Path:
    """Write the trainer's state into a new folder under `folder` and delete all but the newest two.

    Args:
        folder: The run's folder of checkpoints.
        trainer: Standing between two steps.
        extra: What the run wants back when it resumes; JSON values.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"step-{trainer.position.step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    tensors = {f"parameter.{i}": p.detach().cpu().contiguous() for i, p in enumerate(trainer.parameters)}
    # Singular vectors may come out otherwise on another machine, so those of the start are kept as well.
    tensors |= {f"start.{i}": t.cpu().contiguous() for i, t in enumerate(trainer.adapter.starts())}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    with atomic_path(target / "state.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(target / _LAST_FILE, {"position": asdict(trainer.position), "extra": extra})
    for old in complete_checkpoints(folder)[:-KEPT]:
        # Without its last file it is no checkpoint any more, so a crash while deleting leaves none that lies.
        (old / _LAST_FILE).unlink()
        shutil.rmtree(old)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_LAST_FILE}"))


def load_checkpoint(checkpoint: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a trainer back to where a checkpoint was written.

    Returns:
        The `extra` that it was saved with.

    Raises:
        OutputError: The checkpoint was made by a run with another adapter.
    """
    content = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    tensors = load_file(checkpoint / "state.safetensors")
    expected = {f"parameter.{i}": tuple(p.shape) for i, p in enumerate(trainer.parameters)}
    found = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("parameter.")}
    if expected != found:
        raise OutputError(f"The checkpoint {checkpoint} holds another adapter than this configuration asks for.")
    with torch.no_grad():
        for index, parameter in enumerate(trainer.parameters):
            parameter.copy_(tensors[f"parameter.{index}"])
        for index, start in enumerate(trainer.adapter.starts()):
            start.copy_(tensors[f"start.{index}"])
    state = trainer.optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = value
    trainer.optimizer.load_state_dict(state)
    trainer.position = Position(**content["position"])
    extra: dict[str, Any] = content["extra"]
    return extra
