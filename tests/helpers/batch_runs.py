"""What the runs of a batch leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.checks import check
from helpers.metrics import epoch, write_metrics

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config


def config(**lora: Any) -> RunConfig:
    return parse_config({"data": {"folder": "x"}, "lora": lora}, name="n")


def write_run(folder: Path, loss: float, *previews: Any, **signals: Any) -> None:
    """What a run leaves of its kept epoch 2."""
    kept = folder / "epochs" / "2"
    kept.mkdir(parents=True)
    check("clean", *previews, **signals).write(kept)
    write_metrics(folder / "metrics.jsonl", [epoch(1, validation_loss=9.0), epoch(2, validation_loss=loss)])


def runs_in(folder: Path) -> dict[str, Path]:
    """The run folders in a batch's, by the job's name."""
    return {run.name: run for run in folder.iterdir() if run.is_dir()}
