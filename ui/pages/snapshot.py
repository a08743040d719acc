"""Everything that the pages of runs show at a moment, as a value.

Pages ask for it every two seconds; what is slow to make is made once for every change of a run's files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..html import run_views, views
from ..state.background_tasks import KINDS, Kind
from ..state.run_status import Status
from ..state.run_view import read_run
from .context import Context


@dataclass(frozen=True)
class Snapshot:
    """Everything that the pages of a run show at a moment.

    Attributes:
        html: By slot.
        names: All runs.
        waiting: Runs in the queue.
        epochs: Epochs with a copy check.
        loras: Epochs with a LoRA file.
        kept: The recommended epoch so far; None before there is one.
        prompt: A prompt to try the run with.
        can: Which actions are possible: "pause", "proceed", "stop", "resume".
        ends: The label of the button of each background task; None where there is no task.
    """

    html: dict[str, str]
    names: list[str]
    waiting: list[str]
    epochs: list[int]
    loras: list[int]
    kept: int | None
    prompt: str
    can: dict[str, bool]
    ends: dict[Kind, str | None]


def snapshot(context: Context, name: str | None, epoch: int | None) -> Snapshot:
    """Everything to show of one run, and an overview of all others.

    Args:
        context: The studio.
        name: The run; None if none is chosen.
        epoch: The epoch whose comparisons are shown; None for the last one.
    """
    statuses, shown = context.statuses(), context.studio.shown
    status = next((other for other in statuses if other.name == name), None) or Status(name or "", "none")
    views_of = {other.name: read_run(context.studio, other.name) for other in statuses}
    run = views_of.get(name or "")
    last = max(run.checks, default=0) if run else 0
    html = {
        "strip": views.strip(statuses),
        "queue": views.queue(statuses),
        "status": run_views.status_panel(status),
        "cards": run_views.run_cards([(other, views_of[other.name]) for other in statuses], shown),
        "caption": views.caption_task(context.tasks), "publish": views.publish_task(context.tasks),
        "charts": "", "grid": "", "banner": "", "pairs": "", "signs": "", "result": "",
    }  # fmt: skip
    if run is None:
        empty = views.message("It appears once a run has started.", title="Nothing to see yet")
        html |= {"banner": empty, "result": empty}
    else:
        chosen = epoch if epoch in run.checks else last
        html |= {
            "charts": _charts(run),
            "grid": _grid(run, shown),
            "banner": run_views.copy_banner(run, status),
            "pairs": _pairs(run, chosen or 0, shown),
            "signs": _signs(run),
            "result": run_views.result_panel(run, status),
        }
    recommended = run.recommended() if run else None
    tasks = {kind: context.tasks.find(kind) for kind in KINDS}
    drawn = run.checks[last].previews if run and last in run.checks else []
    prompts = [match.prompt for match in drawn if match.kind == "novel"]
    can = {
        "pause": status.word == "running",
        "proceed": status.word == "paused",
        "stop": status.word in ("running", "starting", "paused"),
        "resume": status.can_resume,
    }
    return Snapshot(
        html,
        [other.name for other in statuses],
        [other.name for other in statuses if other.position is not None],
        sorted(run.checks) if run else [],
        sorted(run.loras) if run else [],
        recommended[0] if recommended else None,
        prompts[0] if prompts else "",
        can,
        {
            kind: None if task is None else "Stop" if context.tasks.stage(task) == "running" else "Hide this"
            for kind, task in tasks.items()
        },
    )


# A run's view is one object for as long as none of its files change.
_charts = functools.lru_cache(maxsize=16)(run_views.training_charts)
_grid = functools.lru_cache(maxsize=16)(run_views.epoch_grid)
_pairs = functools.lru_cache(maxsize=32)(run_views.copy_pairs)
_signs = functools.lru_cache(maxsize=16)(run_views.copy_charts)
