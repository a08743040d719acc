"""The time left of a run, from its events.

Read by the progress bar and by `state.json`, which the studio shows.
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
# Steps of other shapes are no pauses, nor are ends of epochs that prove a file where that of epoch 0 did not.
_PAUSED_STEP, _PAUSED_END = 2.0, 4.0


class Timer:
    """Estimates the time left: the steps and ends of epochs that are to come, times what one of them takes.

    A step is measured before the first one and then by those that are done, an epoch's end by the last ones. Before
    there was any, it is taken for its previews, at the speed at which images are drawn for the copy check's null.

    Args:
        clock: Seconds that only grow.
        closing_seconds: What an epoch's end took in an earlier part of the run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, closing_seconds: float | None = None) -> None:
        self._clock = clock
        self._plan: events.PlanMade | None = None
        self._step = 0
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        # Previews, validation loss, copy check, export with its proof, page: all that is done at the end of an epoch.
        self._closings: deque[float] = deque([] if closing_seconds is None else [closing_seconds], maxlen=_RECENT_ENDS)
        self._closings_left = 0
        self._closing_since: float | None = None
        self._images: deque[float] = deque(maxlen=_RECENT_ENDS)
        self._drawn = self._images_left = 0
        self._last = clock()

    def see(self, event: Event) -> None:
        """Learn from an event, at the moment at which it happens."""
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
            # It comes when the validation loss is measured, for which the epoch's checkpoint was saved.
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
        """What the end of an epoch takes; None until one was seen."""
        return _usual(self._closings, _PAUSED_END) if self._closings else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end of the run, previews included; None until it is known what a step and a preview take."""
        if self._plan is None or not self._steps:
            return None
        image = _usual(self._images, _PAUSED_END) if self._images else 0.0
        closing = self._plan.previews * image if self.closing_seconds is None else self.closing_seconds
        if closing == 0.0 and self._plan.previews:
            return None
        gone = 0.0 if self._closing_since is None else min(closing, self._last - self._closing_since)
        steps = (self._plan.steps - self._step) * _usual(self._steps, _PAUSED_STEP)
        return steps + self._images_left * image + self._closings_left * closing - gone


def _usual(seconds: Collection[float], longest: float) -> float:
    """The mean of times but for those over `longest` medians: a pause fell into them, or a first call."""
    most = longest * statistics.median_low(seconds)
    return statistics.fmean(value for value in seconds if value <= most)
