"""Checkpoints for exact resume: adapter, average, optimizer and counters, never left incomplete by a crash.

Saved by the run when the trainer says so. A checkpoint is a folder that counts only once its last file,
`complete.json`, is there; that file holds a checksum of both. No generator states are kept, because randomness is a
function of counters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.common.files import atomic_path, sha256, write_json
from sdlora.common.version import __version__
from sdlora.errors import OutputError
from sdlora.events import fields_from_json, to_json
from sdlora.training.trainer import Position, Trainer

KEPT = 2
FORMAT = 1  # raised when earlier versions can no longer read it
_LAST_FILE, _TENSORS, _CHECKSUM = "complete.json", "state.safetensors", "sha256"


def save_checkpoint(folder: Path, trainer: Trainer, extra: dict[str, Any]) -> Path:
    """Write a trainer's state between two steps into a new folder under `folder`, and delete all but the newest two.

    `extra` holds JSON values that the run needs when it resumes. Returns the checkpoint's folder.
    """
    target = folder / f"step-{trainer.position.step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    tensors = {f"parameter.{i}": p.detach().cpu().contiguous() for i, p in enumerate(trainer.adapter.parameters())}
    if trainer.step.average is not None:
        averages = trainer.step.model.by_layer(trainer.step.average.values)
        tensors |= {f"average.{i}": value.cpu().contiguous() for i, value in enumerate(averages)}
    # Another machine may compute other singular vectors, so the initial factors are kept as well.
    tensors |= {f"start.{i}": t.cpu().contiguous() for i, t in enumerate(trainer.adapter.initial_factors())}
    optimizer_tensors, scalars = _split(trainer.step.optimizer.state_dict())
    tensors |= optimizer_tensors
    with atomic_path(target / _TENSORS) as temporary:
        save_file(tensors, temporary)
    content: dict[str, Any] = {"format": FORMAT, "version": __version__}
    content |= {"position": to_json(trainer.position), "optimizer": scalars, "extra": extra}
    write_json(target / _LAST_FILE, content | {_CHECKSUM: _checksum(target, content)})
    tidy_checkpoints(folder)
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_LAST_FILE}"))


def tidy_checkpoints(folder: Path) -> None:
    """Delete all but the newest two complete checkpoints, and incomplete ones."""
    kept = complete_checkpoints(folder)[-KEPT:]
    for path in sorted(folder.glob("step-*")):
        if path not in kept:
            # Its last file goes first, so that a crash leaves an incomplete checkpoint and no damaged one.
            (path / _LAST_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)


def load_checkpoint(
    checkpoint: Path, trainer: Trainer, check: Callable[[dict[str, Any]], None] = lambda extra: None
) -> dict[str, Any]:
    """Restore a trainer from a checkpoint, and return the `extra` that it was saved with.

    Args:
        check: Called with `extra` before the trainer is changed, so that it can refuse.

    Raises:
        OutputError: It has a format that this version cannot read, or another adapter, or is damaged.
    """
    content = _read(checkpoint)
    extra: dict[str, Any] = content["extra"]
    check(extra)
    try:
        _restore(checkpoint, trainer, load_file(checkpoint / _TENSORS), content)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(checkpoint, error) from error
    return extra


def _read(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's last file, after its format and the checksum were checked."""
    try:
        content = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(checkpoint, error) from error
    if not isinstance(content, dict):
        raise _damaged(checkpoint, f"{_LAST_FILE} is not an object")
    if (number := content.get("format", 1)) != FORMAT:
        raise OutputError(
            f"The checkpoint {checkpoint} was written by sdlora {content.get('version')}, in a format (number "
            f"{number}) that sdlora {__version__} does not read (it reads number {FORMAT}). Resume with that version, "
            "or start a new run."
        )
    parts = ("position", "optimizer", "extra")
    if missing := [name for name in parts if not isinstance(content.get(name), dict)]:
        raise _damaged(checkpoint, f"{_LAST_FILE} has no {missing[0]}")
    if not isinstance(content["position"].get("step"), int):
        raise _damaged(checkpoint, f"{_LAST_FILE} has no step")
    checksum = content.pop(_CHECKSUM, None)  # earlier versions wrote none
    try:
        if checksum not in (None, _checksum(checkpoint, content)):
            raise _damaged(checkpoint, "its content is not what was written: the checksum differs")
    except OSError as error:
        raise _damaged(checkpoint, error) from error
    return content


def _checksum(checkpoint: Path, content: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's tensors and of everything else in it."""
    canonical = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(f"{sha256(checkpoint / _TENSORS)} {canonical}".encode()).hexdigest()


def _damaged(checkpoint: Path, reason: object) -> OutputError:
    return OutputError(
        f"The checkpoint {checkpoint} is damaged ({reason}). Delete its folder to resume from the one before it."
    )


def _restore(checkpoint: Path, trainer: Trainer, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    expected = {f"parameter.{i}": tuple(p.shape) for i, p in enumerate(trainer.adapter.parameters())}
    found = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("parameter.")}
    # torch would load the states of other parameters without an error.
    num_trained = sum(len(group["params"]) for group in trainer.step.optimizer.param_groups)
    num_states = len(content["optimizer"]["state"])
    if expected != found or num_states not in (0, num_trained):
        raise OutputError(f"The checkpoint {checkpoint} holds another adapter than this configuration's.")
    position = Position(**fields_from_json(Position, content["position"]))
    with torch.no_grad():
        for index, parameter in enumerate(trainer.adapter.parameters()):
            parameter.copy_(tensors[f"parameter.{index}"])
        for index, start in enumerate(trainer.adapter.initial_factors()):
            start.copy_(tensors[f"start.{index}"])
    if trainer.step.average is not None:
        for index, value in enumerate(trainer.step.model.by_layer(trainer.step.average.values)):
            value.copy_(tensors[f"average.{index}"])
    trainer.step.optimizer.load_state_dict(_join(trainer.step.optimizer.state_dict(), tensors, content["optimizer"]))
    trainer.position = position


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and JSON values; Python's JSON restores every float exactly."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"state": {}, "groups": [_scalars(group) for group in state["param_groups"]]}
    for index, values in state["state"].items():
        scalars["state"][str(index)] = _scalars(values)
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                if name not in scalars["state"][str(index)]:
                    raise OutputError(
                        f"The optimizer keeps {name!r} as {type(value).__name__}, which no checkpoint can hold. Choose "
                        "another train.optimizer."
                    )
    return tensors, scalars


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is None or isinstance(value, bool | int | float)}


def _join(state: dict[str, Any], tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`; a group's lists (its parameters, betas) stay as they were made."""
    groups = [group | saved for group, saved in zip(state["param_groups"], scalars["groups"], strict=True)]
    values = {int(index): dict(saved) for index, saved in scalars["state"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", maxsplit=2)
            values[int(index)][key] = value
    return state | {"state": values, "param_groups": groups}
