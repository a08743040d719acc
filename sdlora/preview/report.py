"""The page a person reads during and after a run: one self-contained HTML file.

Floor 6. Everything shown comes from the run's folder; text is escaped, pictures are embedded.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.data.images import load_image
from sdlora.diffusion.timesteps import HIGH_NOISE, NUM_TIMESTEPS
from sdlora.files import write_text
from sdlora.preview.charts import COLORS, Line, bar_chart, line_chart
from sdlora.training.bands import NUM_BANDS, band_names

NUM_BINS = 20
_THUMBNAIL_PX = 64
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.25; } h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; max-width: 29rem; } svg { width: 100%; }
figcaption { font-size: .875rem; color: #555; margin-top: .4rem; }
figcaption img { float: left; margin: .2rem .7rem .2rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; margin: .3rem 0 1.2rem; }
td, th { padding: .15rem .7rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } caption { text-align: left; font-weight: 600; }
@media (max-width: 30rem) { table { font-size: .75rem; } td, th { padding-right: .4rem; } }
pre { background: #f5f5f3; padding: 1rem; overflow-x: auto; font-size: .8125rem; }
"""

Row = Mapping[str, Any]


def write_report(
    target: Path,
    *,
    title: str,
    sentences: Sequence[str],
    sheet: Path,
    metrics: Path,
    config: Path,
    pictures: Path,
    background: str,
) -> None:
    """Write the page.

    Args:
        target: The HTML file.
        title: The run's name.
        sentences: What a person should know first, one paragraph each.
        sheet: The contact sheet; left out if it does not exist.
        metrics: `metrics.jsonl`, from which every number comes.
        config: `config.toml`, shown as it is.
        pictures: The folder of the training pictures, for a thumbnail.
        background: Colour under a thumbnail's transparent pixels.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    epochs = [row for row in rows if row["event"] == "epoch"]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in sentences),
    ]
    if sheet.exists():
        parts.append(f"<h2>Previews</h2><img alt='previews by epoch' src='{_data_url(sheet.read_bytes())}'>")
    if steps:
        parts += ["<h2>Loss</h2><div class='charts'>", _step_figure(steps), *_band_figures(epochs), "</div>"]
        parts += ["<h2>Where the visits went</h2>", _coverage(visited_timesteps(steps), pictures, background)]
    parts += ["<h2>The same numbers</h2>", _epoch_table(epochs), *_band_tables(epochs)]
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(config.read_text(encoding='utf-8'))}</pre></html>"]
    write_text(target, "\n".join(parts) + "\n")


# --- Where the visits went -----------------------------------------------------------------------------------------


def visited_timesteps(steps: Sequence[Row]) -> dict[str, list[int]]:
    """Every picture's timesteps in the order of its visits, by name."""
    visited: dict[str, list[int]] = {}
    for row in steps:
        for name, timestep in zip(row["examples"], row["timesteps"], strict=True):
            visited.setdefault(name, []).append(timestep)
    return dict(sorted(visited.items()))


def largest_gap(timesteps: Sequence[int]) -> tuple[int, int]:
    """The widest stretch between two neighbours, the edges 0 and 999 counting as visited."""
    places = sorted([0, *timesteps, NUM_TIMESTEPS - 1])
    return max(itertools.pairwise(places), key=lambda pair: pair[1] - pair[0])


def _coverage(visited: Mapping[str, Sequence[int]], pictures: Path, background: str) -> str:
    gaps = {name: largest_gap(timesteps) for name, timesteps in visited.items()}
    name = max(gaps, key=lambda picture: gaps[picture][1] - gaps[picture][0])
    unseen = sum(max(timesteps) < HIGH_NOISE for timesteps in visited.values())
    everything = [timestep for timesteps in visited.values() for timestep in timesteps]
    first, last = gaps[name]
    return (
        "<div class='charts'>"
        + "\n".join(
            [
                _figure(
                    "All pictures",
                    _histogram(everything),
                    f"Each bar counts the visits to {NUM_TIMESTEPS // NUM_BINS} neighbouring noise levels: details are "
                    "learned on the left, the composition on the right. "
                    f"{unseen} of {len(visited)} pictures never saw a timestep of {HIGH_NOISE} or more.",
                ),
                _figure(
                    f"Least covered: {name}",
                    _histogram(visited[name]),
                    f"Of all pictures, this one has the widest stretch without a visit: timesteps {first} to {last}, "
                    f"after {len(visited[name])} visits.",
                    _thumbnail(pictures / name, background),
                ),
            ]
        )
        + "</div>"
    )


def _histogram(timesteps: Sequence[int]) -> str:
    counts = [0] * NUM_BINS
    for timestep in timesteps:
        counts[timestep * NUM_BINS // NUM_TIMESTEPS] += 1
    marks = list(range(0, NUM_TIMESTEPS + 1, NUM_TIMESTEPS // NUM_BANDS))
    return bar_chart(counts, marks, x_name="timestep (more noise to the right)", y_name="visits")


def _thumbnail(picture: Path, background: str) -> str:
    # A run may be resumed after its pictures were moved; the page does without, the name is there.
    if not picture.exists():
        return ""
    image = load_image(picture, background)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    content = io.BytesIO()
    image.save(content, format="PNG")
    size = f"width='{image.width}' height='{image.height}'"
    return f"<img alt='{html.escape(picture.name, quote=True)}' {size} src='{_data_url(content.getvalue())}'>"


# --- Losses --------------------------------------------------------------------------------------------------------


def _step_figure(steps: Sequence[Row]) -> str:
    losses = [row["loss"] for row in steps]
    smooth, mean = [], losses[0]
    for loss in losses:
        mean += 0.05 * (loss - mean)
        smooth.append(mean)
    lines = [Line("step", losses, "#767676", width=0.7), Line("mean", smooth, COLORS[1])]
    chart = line_chart(lines, [row["step"] for row in steps], x_name="step", y_name="training loss")
    return _figure(
        "Training, step by step",
        chart,
        "The loss of each step and its running mean; it jumps, because some noise levels are harder than others.",
    )


_BAND_FIGURES = (
    (
        "train_bands",
        "Training, by noise level",
        "training loss",
        "The loss of the pictures that are trained, from little noise (timesteps 0-199) to the most (800-999).",
    ),
    (
        "heldout_bands",
        "Held-out pictures, by noise level",
        "held-out loss",
        "The loss of pictures that are never trained on: where it rises again, the LoRA begins to learn by heart.",
    ),
    (
        "heldout_change",
        "What the LoRA changes on them",
        "adapter on minus off",
        "The same with the adapter on minus off: below 0 the LoRA is better than the base, above 0 it is worse.",
    ),
)


def _band_figures(epochs: Sequence[Row]) -> list[str]:
    figures = []
    for key, title, y_name, sentence in _BAND_FIGURES:
        rows = [row for row in epochs if row.get(key) is not None]
        lines = [Line(name, [row[key][band] for row in rows], COLORS[band]) for band, name in enumerate(band_names())]
        values = [value for line in lines for value in line.values if value is not None]
        # A weighting may take a band's only visit to exactly 0, which no axis of ratios holds.
        log = key != "heldout_change" and min(values, default=0.0) > 0
        name = f"{y_name} (logarithmic)" if log else y_name
        chart = line_chart(lines, [row["epoch"] for row in rows], x_name="epoch", y_name=name, log=log)
        if chart:
            figures.append(_figure(title, chart, sentence))
    return figures


def _band_tables(epochs: Sequence[Row]) -> list[str]:
    titles = {
        "train_bands": "Training loss by timesteps",
        "heldout_bands": "Held-out loss by timesteps",
        "heldout_change": "Held-out loss, adapter on minus off",
    }
    return [
        _table(title, ["epoch", *band_names()], [[_epoch(row), *map(_number, row[key])] for row in rows])
        for key, title in titles.items()
        if (rows := [row for row in epochs if row.get(key) is not None])
    ]


def _epoch_table(epochs: Sequence[Row]) -> str:
    head = ["epoch", "training loss", "held-out loss", "seconds"]
    rows = [
        [_epoch(row), _number(row["train_loss"]), _number(row["heldout_loss"]), f"{row['seconds']:.1f}"]
        for row in epochs
    ]
    return _table("All timesteps together", head, rows)


# --- Parts of the page ---------------------------------------------------------------------------------------------


def _epoch(row: Row) -> str:
    return str(row["epoch"] or "base")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><caption>{title}</caption><tr>{top}</tr>{body}</table></div>"


def _figure(title: str, chart: str, sentence: str, picture: str = "") -> str:
    caption = f"<figcaption>{picture}{html.escape(sentence)}</figcaption>"
    return f"<figure><h3>{html.escape(title)}</h3>{chart}{caption}</figure>"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
