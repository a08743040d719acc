"""The time left of a run, estimated from its events.

Shown by the progress bar and written to `state.json`, which the studio reads.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection

from sdlora import events
from sdlora.copycheck.null_distribution import PHASE
from sdlora.events import Event

_RECENT_STEPS, _RECENT_ENDS = 100, 3
# Low enough for pauses; high enough for steps of other shapes, and for epochs that verify a file as epoch 0 does not.
_PAUSED_STEP, _PAUSED_END = 2.0, 4.0


class Timer:
    """Estimates the time left: the steps and ends of epochs to come, times the seconds that each takes.

    A step's seconds come from the rehearsal, then from the steps done; those of an epoch's end from the last ones.
    Before the first end of an epoch, its previews stand for it, at the speed at which the base model draws images for
    the copy check.

    `closing_seconds` are those of an epoch's end in an earlier part of the run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, closing_seconds: float | None = None) -> None:
        self._clock = clock
        self._plan: events.PlanMade | None = None
        self._step = 0
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        # An epoch's end: validation loss, export and its verification, previews, copy check, report.
        self._closings: deque[float] = deque([] if closing_seconds is None else [closing_seconds], maxlen=_RECENT_ENDS)
        self._closings_left = 0
        self._closing_since: float | None = None
        self._images: deque[float] = deque(maxlen=_RECENT_ENDS)
        self._drawn = self._images_left = 0
        self._last = clock()

    def see(self, event: Event) -> None:
        """Take in an event at the moment it happens."""
        now = self._clock()
        if isinstance(event, events.PlanMade):
            self._plan, self._closings_left = event, event.epochs + 1
        elif isinstance(event, events.StepRehearsed):
            self._steps.append(event.seconds)
        elif isinstance(event, events.StepDone):
            self._steps.append(event.seconds)
            self._step = event.step
            if self._plan is not None:
                self._closings_left = self._plan.epochs - event.epoch + 1
        elif isinstance(event, events.EpochDone):
            # The event follows the validation loss, which belongs to the epoch's end.
            self._closing_since = self._last
        elif isinstance(event, events.Progress):
            self._see_progress(event, now)
        self._last = now

    def _see_progress(self, event: events.Progress, now: float) -> None:
        if event.phase == "page" and self._closing_since is not None:
            self._closings.append(now - self._closing_since)
            self._closings_left -= 1
            self._closing_since = None
        elif event.phase in (PHASE, "previews") and not self._closings:
            before = self._drawn if event.done > self._drawn else 0
            self._images.append((now - self._last) / (event.done - before))
            self._drawn = event.done
            # Previews are part of an epoch's end.
            self._images_left = event.total - event.done if event.phase == PHASE else 0

    @property
    def closing_seconds(self) -> float | None:
        """Seconds that an epoch's end takes; None before the first."""
        return _typical(self._closings, _PAUSED_END) if self._closings else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end of the run, previews included; None until a step and a preview were timed."""
        if self._plan is None or not self._steps:
            return None
        image = _typical(self._images, _PAUSED_END) if self._images else 0.0
        closing = self._plan.previews * image if self.closing_seconds is None else self.closing_seconds
        if closing == 0.0 and self._plan.previews:
            return None
        gone = 0.0 if self._closing_since is None else min(closing, self._last - self._closing_since)
        steps = (self._plan.steps - self._step) * _typical(self._steps, _PAUSED_STEP)
        return steps + self._images_left * image + self._closings_left * closing - gone


def _typical(seconds: Collection[float], longest: float) -> float:
    """The mean of the times up to `longest` medians; longer ones contain a pause or a first call."""
    most = longest * statistics.median_low(seconds)
    return statistics.fmean(value for value in seconds if value <= most)
