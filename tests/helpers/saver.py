"""Saves checkpoints again and again, in a process that is killed meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import nn

from sdlora.training.checkpoint import load_checkpoint, save_checkpoint
from sdlora.training.trainer import Position, Trainer


def trainer_at(step: int) -> Trainer:
    """What a checkpoint is made of, each number being the step's."""
    parameters = [nn.Parameter(torch.full((64, 8), float(step))) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(float(step))
            optimizer.state[parameter]["exp_avg"].fill_(float(step))
    adapter = SimpleNamespace(initial_factors=lambda: [], parameters=lambda: parameters)
    step_ = SimpleNamespace(parameters=parameters, optimizer=optimizer, average=None)
    return cast(Trainer, SimpleNamespace(adapter=adapter, step=step_, position=Position(step)))


def save_from(folder: Path, first: int, last: int) -> None:
    """Save the checkpoints of these steps, one after the other."""
    for step in range(first, last + 1):
        save_checkpoint(folder, trainer_at(step), {"step": step})


def loaded_step(checkpoint: Path) -> int:
    """The step of a checkpoint, if everything in it is that step's."""
    trainer = trainer_at(0)
    extra = load_checkpoint(checkpoint, trainer)
    step = trainer.position.step
    assert extra == {"step": step} and checkpoint.name == f"step-{step:08d}"
    for parameter in trainer.step.parameters:
        assert bool((parameter == step).all())
        assert bool((trainer.step.optimizer.state[parameter]["exp_avg"] == step).all())
    return step
