"""Everything that the pages of runs show at a moment, as a value.

Pages ask for it every two seconds; what is slow to make is made once for every change of a run's files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..html import run_views, views
from ..state.background_tasks import KINDS, Kind
from ..state.queue import Status
from ..state.run_view import read_run
from .context import Context


@dataclass(frozen=True)
class Snapshot:
    """Everything that the pages of a run show at a moment."""

    html: dict[str, str]  # by slot
    names: list[str]  # all runs
    waiting: list[str]  # runs in the queue
    epochs: list[int]  # epochs with a copy check
    loras: list[int]  # epochs with a LoRA file
    kept: int | None  # the recommended epoch so far; None before there is one
    prompt: str  # a prompt to try the run with
    can: dict[str, bool]  # which actions are possible: "pause", "proceed", "stop", "resume"
    ends: dict[Kind, str | None]  # the label of the button of each background task; None where there is no task


def snapshot(context: Context, name: str | None, epoch: int | None) -> Snapshot:
    """Everything to show of one run, if one is chosen, with the comparisons of an epoch or the last one."""
    statuses, shown = context.statuses(), context.studio.shown
    status = next((other for other in statuses if other.name == name), None) or Status(name or "", "none")
    runs = {other.name: read_run(context.studio, other.name) for other in statuses}
    run = runs.get(name or "")
    last = max(run.checks, default=0) if run else 0
    tasks = {kind: context.tasks.find(kind) for kind in KINDS}
    html: dict[str, str] = {
        "strip": views.strip(statuses),
        "queue": views.queue(statuses),
        "status": run_views.status_panel(status),
        "cards": run_views.run_cards([(other, runs[other.name]) for other in statuses], shown),
        **{kind: views.background_task(context.tasks, kind) for kind in KINDS},
    }
    if run is None:
        empty = views.message("It appears once a run has started.", title="Nothing to see yet")
        html |= {"charts": "", "grid": "", "banner": empty, "pairs": "", "signs": "", "result": empty}
    else:
        html |= {
            "charts": _charts(run),
            "grid": _grid(run, shown),
            "banner": run_views.copy_banner(run, status),
            "pairs": _pairs(run, epoch if epoch in run.checks and epoch is not None else last, shown),
            "signs": _signs(run),
            "result": run_views.result_panel(run, status),
        }
    recommended = run.recommended() if run else None
    drawn = run.checks[last].previews if run and last in run.checks else []
    return Snapshot(
        html,
        names=[other.name for other in statuses],
        waiting=[other.name for other in statuses if other.position is not None],
        epochs=sorted(run.checks) if run else [],
        loras=sorted(run.loras) if run else [],
        kept=recommended[0] if recommended else None,
        prompt=next((match.prompt for match in drawn if match.kind == "novel"), ""),
        can={
            "pause": status.word == "running",
            "proceed": status.word == "paused",
            "stop": status.word in ("running", "starting", "paused"),
            "resume": status.can_resume,
        },
        ends={
            kind: None if task is None else "Stop" if context.tasks.stage(task) == "running" else "Hide this"
            for kind, task in tasks.items()
        },
    )


# A run's view is one object for as long as none of its files change.
_charts = functools.lru_cache(maxsize=16)(run_views.training_charts)
_grid = functools.lru_cache(maxsize=16)(run_views.epoch_grid)
_pairs = functools.lru_cache(maxsize=32)(run_views.copy_pairs)
_signs = functools.lru_cache(maxsize=16)(run_views.copy_charts)
