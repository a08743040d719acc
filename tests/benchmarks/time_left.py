"""How right the time left is, as a run and the studio tell it: a real run, judged from a tenth of its time on.

python tests/benchmarks/time_left.py [--processor] [--record FILE] [CONFIG] [SECTION.KEY=VALUE ...]

With `--processor` seconds are those of the processor for this program alone, which other programs on the machine do not
lengthen; that is right for runs on a CPU with OMP_NUM_THREADS=1. `--record` keeps when which event came, for the tests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora import events
from sdlora.config.toml import load_config
from sdlora.events import Event
from sdlora.run.folder import Timer

FROM = 0.1
WITHIN = 0.2
FLOOR = 0.02  # of the run: nobody is misled by so little, and a fifth of the last second is no measure
# What is kept of events: what a timer reads. Of steps that were read back together the last one stands for all, and of
# what is read from a cache, too.
_KEPT = {
    "plan": ("epochs", "steps", "previews"), "rehearsal": ("seconds",), "progress": ("phase", "done", "total"),
    "step": ("epoch", "step", "seconds"), "epoch": ("epoch", "step"),
}  # fmt: skip
_PLAN = events.PlanMade(0, 0, [], 1, 1, 1, 1, 1, 1, 1, 1, [], "cpu", "fp32")

Timeline = list[tuple[float, str, dict[str, Any]]]
"""Seconds since a run's start, an event's name, and what is kept of it."""


@dataclass(frozen=True)
class Told:
    """What was told at a moment.

    Attributes:
        share: How much of the run's time was gone, in [0, 1].
        told: The seconds left as they were told; None if nothing was.
        left: The seconds that were left.
        allowed: How far the two may be apart.
    """

    share: float
    told: float | None
    left: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether something was told, and that within what is allowed."""
        return self.told is not None and abs(self.told - self.left) <= self.allowed

    def __str__(self) -> str:
        told = "nothing" if self.told is None else f"{self.told:.1f} s"
        off = "" if self.told is None else f" ({(self.told - self.left) / max(self.left, 1e-9):+.0%})"
        return f"at {self.share:.0%}: {told} told, {self.left:.1f} s left{off}"


def judged(told: Iterable[tuple[float, float | None]]) -> list[Told]:
    """What stands there when a tenth of a run is over and all that is told from then on, beside what was left.

    Args:
        told: Seconds since the run's start, growing, and the seconds left as they were told then; the last ones are the
            run's end.
    """
    every = list(told)
    end = every[-1][0]
    early = [eta for at, eta in every if at < FROM * end]
    found = [(FROM * end, early[-1] if early else None), *((at, eta) for at, eta in every if at >= FROM * end)]
    return [Told(at / end, eta, end - at, max(WITHIN * (end - at), FLOOR * end)) for at, eta in found]


def rows(timed: Iterable[tuple[float, Event]]) -> Timeline:
    """What is kept of events, with the seconds at which they came."""
    kept: Timeline = []
    for at, event in timed:
        told = {key: value for key, value in event.to_json().items() if key in _KEPT.get(event.name, ())}
        told |= {key: round(value, 4) for key, value in told.items() if isinstance(value, float)}
        row = (round(at, 2), event.name, told)
        if kept and _one(kept[-1], row):
            kept.pop()
        kept.append(row)
    return kept


def _one(before: tuple[float, str, dict[str, Any]], row: tuple[float, str, dict[str, Any]]) -> bool:
    (_, name, was), (_, same, told) = before, row
    if name == same == "step":
        return bool(was["seconds"] == told["seconds"])
    return name == same == "progress" and told["phase"].startswith("cache") and was["phase"] == told["phase"]


def played(timeline: Timeline) -> Iterator[tuple[float, Event]]:
    """The events of a timeline again, as far as a timer cares."""
    done = 0
    for at, name, told in timeline:
        if name == "plan":
            yield at, events.PlanMade(**{**vars(_PLAN), **told})
        elif name == "rehearsal":
            yield at, events.StepRehearsed(**told)
        elif name == "progress":
            yield at, events.Progress(**told)
        elif name == "epoch":
            yield at, events.EpochDone(told["epoch"], told["step"], None, None, 0.0)
        elif name == "step":
            for step in range(done + 1, told["step"] + 1):
                yield at, events.StepDone(told["epoch"], step, 0.0, 0.0, [], [], [], [], told["seconds"])
            done = told["step"]
        else:
            yield at, events.Notice(name)


def replayed(timeline: Timeline) -> list[tuple[float, float | None]]:
    """The seconds left that a timer tells at every row of a timeline."""
    now = 0.0
    timer = Timer(lambda: now)
    told: dict[float, float | None] = {}
    for now, event in played(timeline):
        timer.see(event)
        told[now] = timer.eta_seconds
    return list(told.items())


def main() -> None:
    """Run a configuration, and print where its estimates were the furthest off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", default="quickstart")
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    if asked.processor:
        time.monotonic = time.process_time  # the run's own clock, too, which its modules take when they are imported
    from sdlora.run.run import start

    begin, timed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for event in start(load_config(asked.config, asked.changes), Path(folder) / "run"):
            timed.append((time.monotonic() - begin, event))
    timeline = rows(timed)
    if asked.record:
        asked.record.write_text("[\n" + ",\n".join(map(json.dumps, timeline)) + "\n]\n", encoding="utf-8")
    found = judged(replayed(timeline))
    off = [one for one in found if not one.right]
    print(f"{timeline[-1][0]:.0f} s; judged {len(found)} times from 10 % on, {len(off)} of them wrong")
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        print(min(found, key=lambda one: abs(one.share - share)))
    worst = max(found, key=lambda one: abs((one.told or 0.0) - one.left) / one.allowed if one.allowed else 0.0)
    print(f"the worst, {worst}")


if __name__ == "__main__":
    main()
