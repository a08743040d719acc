"""Results of a batch by job, its tables, and its page: all jobs in one table, learning against copying, all previews.

Read from the run folders at the end of a batch. The page links to each run's own page and needs nothing else.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from sdlora.batch.jobs import Job
from sdlora.batch.location import Ledger
from sdlora.common.files import write_json, write_text
from sdlora.common.run_files import read_metrics
from sdlora.common.text import format_bytes, format_seconds
from sdlora.config.schema import RunConfig
from sdlora.config.toml import option_fields, options
from sdlora.copycheck.verdict import FIDELITY, EpochCheck, Match
from sdlora.events import saved_as, to_json
from sdlora.report.charts import COLORS, Point, scatter_chart
from sdlora.report.copy_section import VERDICT_COLORS, Grid, Tile, tone
from sdlora.report.html import Album, Figure, read_image, render

TABLES = ("results.csv", "results.json")
_NO_SETTINGS = {"name", "cache.dir"}
_SEVERITY = {"clean": 0, "watch": 1, "copying": 2}
_ALWAYS = ("#", "job", "status")


@dataclass(frozen=True)
class Result:
    """The results of one job; None for what is unknown.

    Attributes:
        number: Position in the batch, from 1; labels points and previews.
        status: As in `sdlora.batch.location.Record`.
        settings: The settings in which the jobs of the batch differ.
        group: Jobs of one group share base, images and seed, so that their losses can be compared.
        verdict: Of the copy check on the kept epoch.
        matches: Share of its previews that match a training image, in [0, 1].
        copying: Mean similarity of its previews to training images, in [0, 1].
        validation_loss: Of the kept epoch.
        fidelity: DINOv2 similarity of its previews to the concept, in [-1, 1].
        epoch: The recommended epoch, which was kept.
        seconds: Time of all attempts together.
        pareto: Whether no job of its group is at least as good in copying and learning, and better in one of them.
    """

    number: int
    job: str
    status: str
    error: str | None
    settings: dict[str, Any]
    group: str
    verdict: str | None = None
    matches: float | None = None
    copying: float | None = None
    validation_loss: float | None = field(default=None, metadata=saved_as("heldout_loss"))
    fidelity: float | None = None
    epoch: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    pareto: bool = False


def collect(jobs: Sequence[Job], ledger: Ledger, runs: Mapping[str, Path]) -> list[Result]:
    """The results of all jobs, in their order; `runs` are the folders of finished jobs by name."""
    different = differing([job.config for job in jobs if job.config is not None])
    results = []
    for number, job in enumerate(jobs, start=1):
        record = ledger.records[job.name]
        values = {} if job.config is None else dict(options(job.config))
        result = Result(
            number,
            job.name,
            *record.outcome,
            {name: values.get(name) for name in different},
            _comparison_group(job.config),
            epoch=record.epoch,
            seconds=record.seconds,
            peak_memory_bytes=record.peak_memory_bytes,
        )
        results.append(_with_figures(result, runs[job.name]) if job.name in runs else result)
    return _with_front(results)


def differing(configs: Sequence[RunConfig]) -> list[str]:
    """The options in which runs differ, in the order of the schema."""
    listed = [dict(options(config)) for config in configs]
    # What the file of lora.from_file decides is not among a configuration's own.
    names = [name for name in option_fields() if name not in _NO_SETTINGS]
    return [name for name in names if any(values.get(name) != listed[0].get(name) for values in listed)]


def _comparison_group(config: RunConfig | None) -> str:
    if config is None:
        return ""
    data, folders = config.data, ", ".join(one.folder for one in config.data.sets)
    validation = (data.validation_folder, data.validation_split)
    return json.dumps([config.base.model_dump(), folders, *validation, data.resolutions(0), config.seed])


def _with_figures(result: Result, folder: Path) -> Result:
    assert result.epoch is not None, "a finished job keeps an epoch"
    losses = read_metrics(folder / "metrics.jsonl").validation_losses()
    result = replace(result, validation_loss=losses.get(result.epoch))
    check = EpochCheck.read(folder / "epochs" / str(result.epoch))
    if check is None:
        return result
    signal = check.signals.get(FIDELITY)
    return replace(
        result,
        verdict=check.verdict,
        matches=check.share,
        copying=sum(match.similarity for match in check.previews) / len(check.previews),
        fidelity=None if signal is None else float(signal["value"]),
    )


def learned(result: Result, group: Sequence[Result]) -> float | None:
    """How much was learned, higher is more: DINOv2 fidelity if the whole group has it, else minus the loss."""
    if all(other.fidelity is not None for other in group):
        return result.fidelity
    return None if result.validation_loss is None else -result.validation_loss


def comparable(results: Sequence[Result]) -> list[list[Result]]:
    """Groups of two or more finished jobs with results for both copying and learning."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.copying is not None:
            groups.setdefault(result.group, []).append(result)
    found = [[one for one in group if learned(one, group) is not None] for group in groups.values()]
    return [group for group in found if len(group) > 1]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are Pareto-optimal, where the first coordinate should be low and the second high."""
    return [
        not any(other != own and other[0] <= own[0] and other[1] >= own[1] for other in points) for own in points
    ]  # fmt: skip


def _with_front(results: Sequence[Result]) -> list[Result]:
    best: set[int] = set()
    for group in comparable(results):
        points = [(one.copying or 0.0, learned(one, group) or 0.0) for one in group]
        best |= {one.number for one, on in zip(group, pareto_front(points), strict=True) if on}
    return [replace(result, pareto=result.number in best) for result in results]


def write_tables(folder: Path, results: Sequence[Result]) -> None:
    """Write `results.csv` and `results.json` of at least one result into the batch's folder."""
    found = [to_json(result) for result in results]
    rows = [
        {name: value for name, value in one.items() if name not in ("settings", "group")} | one["settings"]
        for one in found
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    csv_file, json_file = (folder / name for name in TABLES)
    write_text(csv_file, text.getvalue())
    write_json(json_file, found)


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
