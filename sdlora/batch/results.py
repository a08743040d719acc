"""Results of a batch by job: the settings that differ, the copy check, the losses, and the Pareto front.

Read from the run folders at the end of a batch, for its page and tables.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdlora.batch.jobs import Job
from sdlora.batch.location import Ledger
from sdlora.common.files import write_json, write_text
from sdlora.common.metrics import read_metrics
from sdlora.config.schema import RunConfig
from sdlora.config.toml import options
from sdlora.copycheck.verdict import FIDELITY, EpochCheck
from sdlora.events import saved_as, to_json

TABLES = ("results.csv", "results.json")
_NO_SETTINGS = {"name", "cache.dir"}


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
            _group(job.config),
            epoch=record.epoch,
            seconds=record.seconds,
            peak_memory_bytes=record.peak_memory_bytes,
        )
        results.append(_with_figures(result, runs[job.name]) if job.name in runs else result)
    return _with_front(results)


def differing(configs: Sequence[RunConfig]) -> list[str]:
    """The options in which runs differ, in the order of the schema."""
    listed = [dict(options(config)) for config in configs]
    names = [name for name in (listed[0] if listed else {}) if name not in _NO_SETTINGS]
    return [name for name in names if any(values[name] != listed[0][name] for values in listed)]


def _group(config: RunConfig | None) -> str:
    if config is None:
        return ""
    data, folders = config.data, ", ".join(one.folder for one in config.data.sets)
    validation = (data.validation_folder, data.validation_split)
    return json.dumps([config.base.model_dump(), folders, *validation, data.resolution_px, config.seed])


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
