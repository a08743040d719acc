"""The page of a batch: every job in one table, learning against copying, and all previews side by side.

It links to each run's own page, beside it in the run's folder, and needs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sdlora.batch.results import Result, comparable, learned
from sdlora.common.files import write_text
from sdlora.common.text import format_bytes, format_seconds
from sdlora.copycheck.verdict import EpochCheck, Match
from sdlora.report.charts import COLORS, Point, scatter_chart
from sdlora.report.comparisons import Grid, Tile, tone
from sdlora.report.copy_section import VERDICT_COLORS
from sdlora.report.html import Figure, render
from sdlora.report.images import Album, read_image

_SEVERITY = {"clean": 0, "watch": 1, "copying": 2}
_ALWAYS = ("#", "job", "status")


class Cell(NamedTuple):
    """A cell of the table: what it is sorted by, None last, and what is read."""

    value: object
    text: str


class Column(NamedTuple):
    """A column of the table."""

    name: str
    cell: Callable[[Result], Cell]


def write_page(file: Path, title: str, results: Sequence[Result], runs: Mapping[str, Path]) -> None:
    """Write the page of a batch with at least one result; `runs` are the folders of finished jobs, by name."""
    columns = [
        column for column in _columns(results)
        if column.name in _ALWAYS or any(column.cell(result).text for result in results)
    ]  # fmt: skip
    page = render(
        "batch.html",
        title=title,
        results=results,
        num_done=sum(result.status == "done" for result in results),
        unfinished=[result for result in results if result.status != "done"],
        errors=[result for result in results if result.error],
        groups=[_group(group) for group in comparable(results)],
        columns=columns,
        grids=_grids(results, runs),
    )
    write_text(file, page)


def _columns(results: Sequence[Result]) -> list[Column]:
    names = list(results[0].settings)
    short = [name.rpartition(".")[2] for name in names]
    settings = [
        Column(last.replace("_", " ") if short.count(last) == 1 else name, partial(_setting, name))
        for name, last in zip(names, short, strict=True)
    ]
    return [
        _column("#", lambda one: one.number),
        _column("job", lambda one: one.job),
        _column("status", lambda one: one.status),
        *settings,
        Column("copies?", lambda one: Cell(_SEVERITY.get(one.verdict or ""), one.verdict or "")),
        _column("matches", lambda one: one.matches, "{:.0%}".format),
        _column("similarity", lambda one: one.copying, "{:.3f}".format),
        _column("validation loss", lambda one: one.validation_loss, "{:.4f}".format),
        _column("fidelity", lambda one: one.fidelity, "{:.3f}".format),
        Column("front", lambda one: Cell(int(not one.pareto), "yes" if one.pareto else "")),
        _column("epoch", lambda one: one.epoch),
        _column("time", lambda one: one.seconds or None, format_seconds),
        _column("peak memory", lambda one: one.peak_memory_bytes, format_bytes),
    ]


def _column(name: str, value: Callable[[Result], Any], text: Callable[[Any], str] = str) -> Column:
    """A column of a figure that may be unknown."""
    return Column(name, lambda result: Cell(value(result), "" if value(result) is None else text(value(result))))


def _setting(name: str, result: Result) -> Cell:
    value = result.settings[name]
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    return Cell(value if isinstance(value, int | float) else text, text)


def _group(group: Sequence[Result]) -> dict[str, Any]:
    """Comparable jobs: the one to look at first, if any does not copy, and all of them as points."""
    allowed = [one for one in group if one.verdict != "copying"]
    best = max(allowed, key=lambda one: learned(one, group) or 0.0, default=None)
    by_fidelity, measure = all(one.fidelity is not None for one in group), ""
    if best is not None and by_fidelity:
        measure = f"concept fidelity of {best.fidelity:.3f}"
    elif best is not None:
        measure = f"validation loss of {best.validation_loss:.4f}"
    jobs = [one.job for one in group]
    return {"best": best, "measure": measure, "jobs": jobs, "figure": _front(group, by_fidelity)}


def _front(group: Sequence[Result], by_fidelity: bool) -> Figure:
    points = []
    for result in group:
        color = VERDICT_COLORS.get(result.verdict or "", COLORS[3])
        learning = abs(learned(result, group) or 0.0)
        points.append(Point(str(result.number), result.copying or 0.0, learning, color, result.pareto))
    y_name, better = ("fidelity (DINOv2)", "upper") if by_fidelity else ("validation loss", "lower")
    front = ", ".join(str(result.number) for result in group if result.pareto)
    note = (
        f"The {better} left corner is best: learned much, copied little. Filled and joined points are the Pareto front "
        f"({front}): no other job is better in both. The numbers are those of the table; the colour is the verdict on "
        "copying. Similarity also grows with honest learning, so compare it only between jobs with the same prompts."
    )
    subjects = dict.fromkeys(str(json.loads(result.group)[1]) for result in group)
    chart = scatter_chart(points, x_name="similarity to training images", y_name=y_name)
    return Figure(" / ".join(subjects), chart, note)


def _grids(results: Sequence[Result], runs: Mapping[str, Path]) -> list[Grid]:
    """A grid for every group of jobs that drew the same prompts with the same seeds; a column for each job."""
    groups: dict[tuple[tuple[str, int], ...], list[tuple[Result, list[Match], Path]]] = {}
    for result in results:
        if result.job not in runs:
            continue
        folder = runs[result.job] / "epochs" / str(result.epoch)
        check = EpochCheck.read(folder)
        drawn = check.previews if check is not None else _unchecked(folder)
        if drawn:
            groups.setdefault(tuple((one.prompt, one.seed) for one in drawn), []).append((result, drawn, folder))
    album = Album()
    return [_grid(wanted, columns, album) for wanted, columns in groups.items()]


def _unchecked(folder: Path) -> list[Match]:
    """Previews that nothing was compared with, by the names of their files."""
    files = sorted((folder / "previews").glob("prompt*_seed*.png"))
    return [
        Match(
            prompt=f"prompt {int(file.stem[6:].partition('_')[0]) + 1}", kind="novel",
            seed=int(file.stem.rpartition("seed")[2]), nearest="", hp_ms=0.0, phash=0.0, p_value=1.0,
            significant=False, file=f"previews/{file.name}",
        )
        for file in files
    ]  # fmt: skip


def _grid(
    wanted: Sequence[tuple[str, int]], columns: Sequence[tuple[Result, list[Match], Path]], album: Album
) -> Grid:  # fmt: skip
    rows: dict[str, list[list[Tile | None]]] = {}
    for index, (prompt, seed) in enumerate(wanted):
        tiles: list[Tile | None] = []
        for result, drawn, folder in columns:
            file = folder / drawn[index].file
            image = album.show(str(file), partial(read_image, file), f"{prompt}, job {result.number}, seed {seed}")
            tiles.append(Tile(f"{quote(result.job)}/report.html", image, tone(drawn[index])))
        rows.setdefault(prompt, []).append(tiles)
    return Grid("Previews", [(str(result.number), _swept(result)) for result, _, _ in columns], list(rows.items()))


def _swept(result: Result) -> str:
    """What sets a job apart, short enough for the head of a column."""
    values = [
        f"{name.rpartition('.')[2].replace('_', ' ')} {value:g}"
        for name, value in result.settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return ", ".join(values) or result.job
