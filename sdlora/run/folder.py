"""A run's folder: its files, the recorder that writes state, metrics and log, and the estimate of the time left.

Used by `run`. `state.json` is replaced atomically; `metrics.jsonl` is appended to, and truncated to the checkpoint when
a run resumes.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from sdlora.common.files import disk_full_errors, is_partial, write_json, write_text
from sdlora.common.locks import Holder, hold, holder
from sdlora.common.run_files import RunState, RunStatus, read_state
from sdlora.errors import BusyError, DiskFullError, OutputError
from sdlora.events import EpochDone, Event, Notice, PlanMade, PreviewsDone, Progress, StepDone, StepRehearsed, to_json
from sdlora.run.preview_requests import rounds_within_epochs

_RECORDED = (StepDone, EpochDone)
_STATE_EVERY_SECONDS = 0.5
_RECENT_STEPS, _RECENT_ENDS = 100, 3
# Low enough for pauses; high enough for steps of other shapes, and for epochs that verify a file as epoch 0 does not.
_PAUSED_STEP, _PAUSED_END = 2.0, 4.0


class RunFolder:
    """The paths of one run, whose LoRA file has its name.

    Attributes:
        config: The resolved configuration.
        state: Its `sdlora.common.run_files.RunState`.
        metrics: One JSON object per step and per epoch.
        log: Notices and events in words, and tracebacks of failures.
        lock: Locked by the process that runs here; see `sdlora.common.locks`.
        checkpoints: Training states for an exact resume.
        lora: The LoRA of the recommended epoch.
        lora_for_diffusers: The same under PEFT's names, where diffusers does not read the other; missing in most.
        peft: Folders for `PeftModel.from_pretrained`, of runs with file.format = "peft".
        sheet: The contact sheet of all previews.
        card: The model card, for the Hub.
        lengthened: How the run was lengthened; missing in most.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.config = path / "config.toml"
        self.state = path / "state.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.lock = path / "run.lock"
        self.checkpoints = path / "checkpoints"
        self.lora = path / f"{name}.safetensors"
        self.lora_for_diffusers = path / f"{name}-peft.safetensors"
        self.peft = path / "peft"
        self.sheet = path / "previews.png"
        self.card = path / "README.md"
        self.lengthened = path / "lengthened.json"

    def epoch(self, epoch: int) -> Path:
        """The folder of an epoch; 0 is the base."""
        return self.path / "epochs" / str(epoch)

    def step(self, step: int) -> Path:
        """The folder of the previews of a step within an epoch."""
        return self.path / "steps" / str(step)

    def epoch_lora(self, epoch: int) -> Path:
        """The LoRA file of an epoch from 1 on."""
        return self.epoch(epoch) / "adapter.safetensors"

    def check(self, *, resume: bool) -> None:
        """Check that a run can start, or resume, here.

        Raises:
            BusyError: Another process runs here.
            OutputError: The folder contains another run, other files or nothing to resume, or cannot be written.
        """
        if (other := holder(self.lock)) is not None and other.pid != os.getpid():
            raise BusyError(self._taken(other))
        existing = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not os.access(existing, os.W_OK):
            raise OutputError(f"{self.path} cannot be written: {existing} is read-only. Choose another --output.")
        if resume:
            if not self.config.is_file():
                raise OutputError(f"There is no run to resume in {self.path}: it has no config.toml.")
            return
        if self.path.is_file():
            raise OutputError(f"{self.path} is a file. Choose a folder with --output.")
        if self.config.exists() or self.state.exists():
            raise OutputError(
                f"{self.path} already contains a run. Resume it with --resume, or choose another folder with --output."
            )
        # Ignore what a run that was killed while starting left behind.
        if self.path.is_dir() and any(not is_partial(p) and p != self.lock for p in self.path.iterdir()):
            raise OutputError(f"{self.path} is not empty. Choose a new folder with --output.")

    @contextmanager
    def occupied(self, purpose: str) -> Iterator[None]:
        """Create and lock the folder within the block, for a purpose that processes are told that find it locked.

        Raises:
            BusyError: Another process runs here.
            OutputError: The folder cannot be written.
        """
        with ExitStack() as held:
            try:
                with disk_full_errors(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    held.enter_context(hold(self.lock, purpose))
            except BusyError as error:
                raise BusyError(self._taken(holder(self.lock))) from error
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def create(self, config_toml: str) -> None:
        """Write the configuration, the first file of a run.

        Raises:
            OutputError: The folder cannot be written.
        """
        try:
            write_text(self.config, config_toml)
        except OSError as error:
            raise self._unwritable(error) from error

    def _taken(self, other: Holder | None) -> str:
        who = f" ({other})" if other else ""
        return f"{self.path} is in use by another run{who}. Wait until it ends, or choose another --output."

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error.strerror}. Choose another folder with --output.")


class Recorder:
    """Writes events to `state.json`, `metrics.jsonl` and `log.txt` in an existing run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        before = read_state(folder.state)  # of the part of the run that is resumed
        self._state = RunState(pid=os.getpid(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        if before is not None:
            # Where it fails before it continues, it still was as far as before.
            reached = {name: getattr(before, name) for name in ("epoch", "step", "total_steps", "closing_seconds")}
            self._state = replace(self._state, **reached)
        self._planned_steps = self._state.total_steps
        self._timer = Timer(closing_seconds=self._state.closing_seconds)
        self._written = 0.0

    def record(self, event: Event) -> None:
        """Write an event to the files it belongs to.

        Raises:
            OutputError: The run's folder was removed.
        """
        if not self.folder.config.is_file():
            raise OutputError(
                f"The folder {self.folder.path} was removed or renamed while the run trained, so that it cannot go on. "
                "Put it back and resume the run, or start it again."
            )
        state = self._state
        self._timer.see(event)
        if isinstance(event, PlanMade):
            self._planned_steps = event.steps
            if not state.step:  # where a resumed run is refused, its steps stay what they were
                state = replace(state, total_steps=event.steps)
        elif isinstance(event, Progress):
            state = replace(state, phase=event.phase, done=event.done, total=event.total)
        elif isinstance(event, StepDone):
            state = replace(state, phase="train", epoch=event.epoch, step=event.step, done=event.step)
            state = replace(state, total_steps=self._planned_steps, total=self._planned_steps or 0)
        elif isinstance(event, EpochDone):
            state = replace(state, epoch=event.epoch)
        self._state = state
        if isinstance(event, _RECORDED):
            _append(self.folder.metrics, json.dumps(event.to_json(), ensure_ascii=False))
        elif not isinstance(event, Progress):
            self.log(event.message if isinstance(event, Notice) else json.dumps(event.to_json(), ensure_ascii=False))
        is_rare = not isinstance(event, (Progress, StepDone))
        if is_rare or time.monotonic() - self._written > _STATE_EVERY_SECONDS:
            self._state = replace(
                state, eta_seconds=self._timer.eta_seconds, closing_seconds=self._timer.closing_seconds
            )
            self._write_state()

    def finish(self, status: RunStatus, error: str | None = None) -> None:
        """Record how the run ended: "done", "stopped" or "failed"."""
        self._state = replace(self._state, status=status, error=error, eta_seconds=0.0 if status == "done" else None)
        if not self.folder.path.is_dir():
            return  # and none is made
        # A full disk may prevent this as well; the caller raises the original error.
        with suppress(DiskFullError, OSError) if status == "failed" else nullcontext():
            self._write_state()
            if error:
                self.log(f"{status}: {error}")

    def log(self, message: str) -> None:
        """Add a line to the log."""
        _append(self.folder.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")

    def metrics_bytes(self) -> int:
        """Length of the metrics, saved in checkpoints so that a resumed run continues them exactly.

        They are on the disk when this returns, so that no checkpoint counts bytes that a power cut takes away.
        """
        if not self.folder.metrics.exists():
            return 0
        with self.folder.metrics.open("rb") as handle:
            os.fsync(handle.fileno())
        return self.folder.metrics.stat().st_size

    def cut_metrics(self, num_bytes: int) -> str | None:
        """Drop what was recorded after a checkpoint; where less is left than that, return a sentence that says so."""
        content = self.folder.metrics.read_bytes()[:num_bytes] if self.folder.metrics.exists() else b""
        # Where a file was longer than what was on the disk, zeros stand for the rest.
        whole = content.partition(b"\0")[0]
        whole = whole[: whole.rfind(b"\n") + 1]
        if self.folder.metrics.exists():
            os.truncate(self.folder.metrics, len(whole))
        if len(whole) == num_bytes:
            return None
        return (
            f"{self.folder.metrics.name} has lost its last {num_bytes - len(whole)} bytes, as a power cut can do: some "
            "steps are missing in the charts. What was trained is complete."
        )

    def _write_state(self) -> None:
        write_json(self.folder.state, to_json(self._state))
        self._written = time.monotonic()


def _append(path: Path, line: str) -> None:
    with disk_full_errors(path), path.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")


class Timer:
    """Estimates the time left: the steps and ends of epochs to come, times the seconds that each takes.

    A step's seconds come from the rehearsal, then from the steps done; those of an epoch's end from the last ones.
    Before the first end of an epoch, its previews stand for it, at the speed at which the first of the base model's are
    drawn.

    `closing_seconds` are those of an epoch's end in an earlier part of the run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, closing_seconds: float | None = None) -> None:
        self._clock = clock
        self._plan: PlanMade | None = None
        self._step = 0
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._rounds: deque[float] = deque(maxlen=_RECENT_ENDS)  # previews within an epoch
        # An epoch's end: validation loss, export and its verification, previews, copy check, report.
        self._closings: deque[float] = deque([] if closing_seconds is None else [closing_seconds], maxlen=_RECENT_ENDS)
        self._closings_left = 0
        self._closing_since: float | None = None
        self._images: deque[float] = deque(maxlen=_RECENT_ENDS)
        self._drawn = 0
        self._last = clock()

    def see(self, event: Event) -> None:
        """Take in an event at the moment it happens."""
        now = self._clock()
        if isinstance(event, PlanMade):
            self._plan, self._closings_left = event, event.epochs + 1
        elif isinstance(event, StepRehearsed):
            self._steps.append(event.seconds)
        elif isinstance(event, StepDone):
            self._steps.append(event.seconds)
            self._step = event.step
            if self._plan is not None:
                self._closings_left = self._plan.epochs - event.epoch + 1
        elif isinstance(event, EpochDone):
            # The event follows the validation loss, which belongs to the epoch's end.
            self._closing_since = self._last
        elif isinstance(event, PreviewsDone) and event.step is not None:
            self._rounds.append(event.seconds)
        elif isinstance(event, Progress):
            self._see_progress(event, now)
        self._last = now

    def _see_progress(self, event: Progress, now: float) -> None:
        if event.phase == "page" and self._closing_since is not None:
            self._closings.append(now - self._closing_since)
            self._closings_left -= 1
            self._closing_since = None
        elif event.phase == "previews" and not self._closings:
            before = self._drawn if event.done > self._drawn else 0
            self._images.append((now - self._last) / (event.done - before))
            self._drawn = event.done

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
        plan = self._plan
        rounds = rounds_within_epochs(plan.previews_every_steps, plan.steps, plan.epochs, self._step)
        if rounds:
            steps += rounds * (_typical(self._rounds, _PAUSED_END) if self._rounds else closing)
        return steps + self._closings_left * closing - gone


def _typical(seconds: Collection[float], longest: float) -> float:
    """The mean of the times up to `longest` medians; longer ones contain a pause or a first call."""
    most = longest * statistics.median_low(seconds)
    return statistics.fmean(value for value in seconds if value <= most)
