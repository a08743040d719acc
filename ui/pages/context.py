"""What all pages of the studio share: its folder, queue, sampler and controls, and what they show of runs at a moment.

Here an unexpected error becomes a message on the page, and its traceback goes to the studio's log. A snapshot is made
for every page every two seconds; what is slow to make is made once for every change of a run's files.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.common.bundled import BUILTIN, shipped_sets
from sdlora.data.captions import with_trigger
from sdlora.errors import ConfigError, SdloraError
from sdlora.models.families import CLASSES

from ..html import views
from ..settings.bases import POCKET, base_resolution_px, family_of
from ..settings.draft import Draft, read_draft
from ..settings.wording import finding_in_words, in_words
from ..state import image_set
from ..state.background_tasks import KINDS, BackgroundTasks, Kind
from ..state.bin import Bin, Change
from ..state.decoded import Examiner
from ..state.folder_notes import read_notes
from ..state.folders import Studio
from ..state.image_set import SetView, view
from ..state.queue import Jobs, Status
from ..state.run_view import RunView, read_run
from ..state.set_editor import SetEditor
from ..state.token_windows import Reading, read_caption
from ..state.try_lora import LoraSampler
from .looks import Looks

# For events that send a choice whose list changes while a tab is open, such as a run, an epoch or a page of cards:
# Gradio answers with an error where it is not in the list any more, while the handlers know what to do.
ANY_VALUE: dict[str, Any] = {"preprocess": False}


@dataclass(frozen=True)
class Live:
    """What is kept up to date on the pages of runs."""

    run: gr.Dropdown  # the run that is looked at
    parts: dict[str, Any] = field(default_factory=dict)  # components by name: of a snapshot's HTML, buttons, choices
    events: list[Any] = field(default_factory=list)  # clicks after which the pages are refreshed

    def add_note(self, name: str) -> gr.HTML:
        """Lay out where a page says what became of the last click, until what it is about has changed."""
        self.parts[name] = note = gr.HTML(elem_id=name)
        return note


@dataclass(frozen=True)
class Context:
    """The studio behind the pages."""

    studio: Studio
    jobs: Jobs
    sampler: LoraSampler
    looks: Looks = field(default_factory=Looks)
    examiner: Examiner = field(default_factory=Examiner)

    @property
    def tasks(self) -> BackgroundTasks:
        """The background tasks."""
        return BackgroundTasks(self.studio)

    def draft(self) -> Draft:
        """The recipe as it was last edited."""
        return read_draft(self.studio)

    def sets(self) -> list[str]:
        """The sets of images that can be chosen: those of the studio, then shipped ones."""
        own = sorted(path.name for path in self.studio.sets.iterdir() if path.is_dir() and path.name[0] != ".")
        return [*own, *(BUILTIN + name for name in shipped_sets())]

    def view_set(self, draft: Draft) -> SetView:
        """The draft's images with the doctor's findings; empty if none are chosen.

        Raises:
            ConfigError: They are not a set, or lie outside the folders that may be read.
        """
        folder = draft.folder(self.studio)
        if folder is None:
            return SetView(Path(), (), (), ())
        taken_out = read_notes(self.studio, folder).taken_out
        if not self._is_looked_at(folder):
            return image_set.first_look(folder, taken_out)
        family = family_of(draft.base)
        has_windows = family is None or CLASSES[family].reads_windows
        return _view(
            folder, image_set.state(folder) if folder.is_dir() else "", draft.trigger,
            draft.value("data.resolution_px") or base_resolution_px(draft.base), taken_out,
            draft.value("data.max_token_windows") if has_windows else None, draft.base == POCKET,
        )  # fmt: skip

    def _is_looked_at(self, folder: Path) -> bool:
        """Whether a set's images were decoded; if they are many, that is done while its first look is shown."""
        return self.examiner.is_done([*image_set.images_of(folder).values()], image_set.fingerprint(folder))

    def editor(self, images: str) -> SetEditor:
        """A set of images, as it was chosen, for changing it.

        Raises:
            SdloraError: The set does not exist.
        """
        return SetEditor(self.studio, images)

    def fingerprint(self, images: str) -> str:
        """A value that changes with a set's images, and when they have been looked at; empty if there is no set."""
        try:
            folder = self.editor(images).folder
            return image_set.fingerprint(folder) + ("" if self._is_looked_at(folder) else "?")
        except SdloraError:
            return ""

    def free_name(self, wanted: str) -> str:
        """An unused name for a run: `wanted`, with a number appended if it is taken."""
        taken = {name.lower() for name in self.jobs.names()}
        name, number = wanted, 2
        while name.lower() in taken or (self.studio.runs / name).exists():
            name, number = f"{wanted}-{number}", number + 1
        return name

    def statuses(self) -> list[Status]:
        """The states of all runs; a folder that cannot be read as one is "unreadable" and stops nothing else."""
        return [status for status, _ in self.overview()]

    def overview(self) -> list[tuple[Status, RunView | None]]:
        """The state of every run with its content, which is None before it has started."""
        found: list[tuple[Status, RunView | None]] = []
        for status in self.jobs.statuses():
            try:
                found.append((status, None if status.word == "unreadable" else read_run(self.studio, status.name)))
            except SdloraError as error:
                reason = f"Its files cannot be read; they may be of a later version of sdlora. {error}"
                found.append((replace(status, word="unreadable", error=reason), None))
        return found

    def default_run(self) -> str | None:
        """The run to show first: one that is training, else the one that changed last."""
        statuses = self.statuses()
        for status in statuses:
            if status.alive:
                return status.name
        known = [status.name for status in statuses if status.word != "unreadable"]
        begun = [name for name in known if (self.studio.run(name) / "config.toml").is_file()]
        return max(begun, key=self._changed, default=None)

    def _changed(self, name: str) -> float:
        folder = self.studio.run(name)
        files = [file for file in (folder / "state.json", folder / "config.toml") if file.is_file()]
        return max((file.stat().st_mtime for file in files), default=0.0)

    def attempt(self, action: Callable[..., str | None], *arguments: Any) -> str:
        """Run an action; returns its message as HTML, or the error's."""
        try:
            text = action(*arguments)
            return views.message(text, "busy") if text else ""
        except SdloraError as error:
            return failure(error)
        except Exception as error:
            return self.unexpected(error)

    def unexpected(self, error: Exception) -> str:
        """Log the traceback of an internal error, which is being handled; returns a message as HTML."""
        self.log(traceback.format_exc())
        return views.message(
            f"Internal error of the studio: {type(error).__name__}: {error}. Runs are not affected. "
            f"Details are in {self.studio.own / 'studio.log'}.",
            "copying",
        )

    def log(self, text: str) -> None:
        """Append to the studio's own log."""
        with (self.studio.own / "studio.log").open("a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


@functools.lru_cache(maxsize=16)
def _view(
    folder: Path, _state: str, trigger: str, resolution_px: int, taken_out: tuple[str, ...], windows: int | None,
    is_pocket: bool,
) -> SetView:  # fmt: skip
    """A set's images with the findings in the words of the pages; the same as long as none of its files changes."""

    def read(caption: str) -> Reading:
        return read_caption(with_trigger(caption, trigger) if caption else "", windows or 1, is_pocket=is_pocket)

    found = view(
        folder, trigger=trigger or None, resolution_px=resolution_px, taken_out=taken_out,
        read=None if windows is None else read,
    )  # fmt: skip
    findings = tuple(replace(finding, message=finding_in_words(finding)) for finding in found.findings)
    cards = tuple(replace(card, findings=tuple(map(in_words, card.findings))) for card in found.cards)
    return replace(found, findings=findings, cards=cards)


def failure(error: SdloraError) -> str:
    """An error as a message in the words of the pages."""
    return views.message(in_words(str(error)), "copying")


def need(run: Any) -> str:
    """The chosen run.

    Raises:
        ConfigError: None is chosen.
    """
    if not run:
        raise ConfigError("No run is chosen. Choose one at the top of the page.")
    return str(run)


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
    causes: dict[str, Any]  # what each note is about, by its name: it is cleared once this has changed
    deleted: Change | None  # the last run that was deleted and can be put back


def snapshot(context: Context, name: str | None, epoch: int | None) -> Snapshot:
    """Everything to show of one run, if one is chosen, with the comparisons of an epoch or the last one."""
    overview, shown = context.overview(), context.studio.shown
    statuses = [status for status, _ in overview if status.word != "unreadable"]
    status, run = next((both for both in overview if both[0].name == name), (Status(name or "", "none"), None))
    last = max(run.checks, default=0) if run else 0
    tasks = {kind: context.tasks.find(kind) for kind in KINDS}
    html: dict[str, str] = {
        "strip": views.strip(statuses),
        "queue": views.queue(statuses),
        "status": views.status_panel(replace(status, error=status.error and in_words(status.error))),
        "cards": views.run_cards(overview, shown),
        **{kind: in_words(views.background_task(context.tasks, kind)) for kind in KINDS},
    }
    if run is None:
        empty = views.message("It appears once a run has started.", title="Nothing to see yet")
        html |= {"charts": "", "grid": "", "banner": empty, "pairs": "", "signs": "", "result": empty}
    else:
        html |= {
            "charts": _charts(run),
            "grid": _grid(run, shown),
            "banner": views.copy_banner(run, status),
            "pairs": _pairs(run, epoch if epoch in run.checks and epoch is not None else last, shown),
            "signs": _signs(run),
            "result": views.result_panel(run, status, shown),
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
        causes={
            "training-note": (status.name, _in_brief(status)),
            "copy-note": (status.name, _in_brief(status)),
            "recipe-note": [(other.name, _in_brief(other)) for other in statuses],
            **{f"{kind}-note": None if task is None else context.tasks.stage(task) for kind, task in tasks.items()},
        },
        deleted=Bin(context.studio).last(context.studio.runs),
    )


def _in_brief(status: Status) -> str:
    """A run's state; the same for all states of a process that is at work."""
    return "at work" if status.word in ("starting", "running", "stopping") else status.word


# A run's view is one object for as long as none of its files change.
_charts = functools.lru_cache(maxsize=16)(views.training_charts)
_grid = functools.lru_cache(maxsize=16)(views.epoch_grid)
_pairs = functools.lru_cache(maxsize=32)(views.copy_pairs)
_signs = functools.lru_cache(maxsize=16)(views.copy_charts)
