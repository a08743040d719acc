"""The page a person reads after a run: one self-contained HTML file.

Floor 6. Everything shown comes from the run's folder; text is escaped, pictures are embedded.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdlora.files import write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img, svg { max-width: 100%; height: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f3; padding: 1rem; overflow-x: auto; } .faint { color: #777; }
"""


def write_report(
    target: Path, *, title: str, sentences: Sequence[str], sheet: Path, metrics: Path, config: Path
) -> None:
    """Write the page.

    Args:
        target: The HTML file.
        title: The run's name.
        sentences: What a person should know first, one paragraph each.
        sheet: The contact sheet; left out if it does not exist.
        metrics: `metrics.jsonl`, for the losses.
        config: `config.toml`, shown as it is.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    epochs = [row for row in rows if row["event"] == "epoch"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences),
    ]
    if sheet.exists():
        encoded = base64.b64encode(sheet.read_bytes()).decode("ascii")
        parts.append(f"<h2>Previews</h2><img alt='previews by epoch' src='data:image/png;base64,{encoded}'>")
    parts += ["<h2>Loss</h2>", _curve([row["loss"] for row in steps]), _epoch_table(epochs)]
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(config.read_text(encoding='utf-8'))}</pre></html>"]
    write_text(target, "\n".join(parts) + "\n")


def _epoch_table(epochs: Sequence[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.5f}"

    rows = "".join(
        f"<tr><td>{row['epoch'] or 'base'}</td><td>{number(row['train_loss'])}</td>"
        f"<td>{number(row['heldout_loss'])}</td><td>{row['seconds']:.1f}</td></tr>"
        for row in epochs
    )
    head = "<tr><th>epoch</th><th>training loss</th><th>held-out loss</th><th>training seconds</th></tr>"
    return f"<table>{head}{rows}</table>"


def _curve(losses: Sequence[float], width: int = 900, height: int = 200) -> str:
    """The loss of every step as a polyline, and its running mean on top."""
    if len(losses) < 2:
        return ""
    smooth, mean = [], losses[0]
    for loss in losses:
        mean += 0.05 * (loss - mean)
        smooth.append(mean)
    top = max(losses) or 1.0

    def points(values: Sequence[float]) -> str:
        return " ".join(
            f"{i * width / (len(values) - 1):.1f},{height - value / top * height:.1f}" for i, value in enumerate(values)
        )

    return (
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='loss by step'>"
        f"<polyline points='{points(losses)}' fill='none' stroke='#bbb' stroke-width='1'/>"
        f"<polyline points='{points(smooth)}' fill='none' stroke='#c33' stroke-width='2'/></svg>"
        f"<p class='faint'>Loss of each step (grey) and its running mean (red), from 0 to {top:.3f}.</p>"
    )
