"""One run: from a configuration to a proven LoRA file, as an iterator of events.

Floor 7, the only place that knows the order of things. The faces call `start` and read the events; what is wrong
with the input is found before the run's folder is made.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sdlora.adapters import limits_elsewhere
from sdlora.card import write_card
from sdlora.config import RunConfig
from sdlora.configfile import FREE_WHEN_RESUMING, dump_toml, load_config, options
from sdlora.data.dataset import Pixels
from sdlora.errors import ConfigError, DataError, OutOfMemoryError, ProcessLostError, SdloraError
from sdlora.events import CheckpointDue, EpochDone, Event, Exported, Notice, PlanMade, PlannedSet, RunDone
from sdlora.files import atomic_path, remove_partial
from sdlora.forecast import memory_of_run
from sdlora.outputs import add_thumbnail, captions_told, export_epoch
from sdlora.parts import BaseSource, Parts, fresh_base, prepare
from sdlora.preview.copycheck import EpochCheck, read_checks, recommend
from sdlora.preview.report import Report, write_report
from sdlora.preview.sampler import PreviewRequest, draw_epoch
from sdlora.preview.sheet import contact_sheet
from sdlora.processes import Processes, join
from sdlora.runfolder import Recorder, RunFolder
from sdlora.training.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint


class Stopped(Exception):
    """The user asked the run to stop; its checkpoint is written and it can be resumed."""


def start(
    config: RunConfig,
    output: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    bases: BaseSource = fresh_base,
) -> Iterator[Event]:
    """Run a configuration.

    Args:
        config: What to do.
        output: The run's folder.
        resume: Go on from the newest complete checkpoint in `output`.
        should_stop: Asked between steps; True saves a checkpoint and ends the run with `Stopped`.
        bases: Where the base comes from; its adapter is taken out again in the end.

    Yields:
        The run's events, ending in `RunDone`.

    Raises:
        SdloraError: Bad input (before anything is written) or a failure on the way.
        Stopped: `should_stop` said so.
    """
    begin = time.monotonic()
    processes = join(config.train.device)
    folder = RunFolder(output, config.name or "lora")
    if not processes.is_main:
        _follow(config, folder, should_stop, processes)
        return
    folder.check(resume=resume)
    if resume:
        config = _as_pinned(config, folder)
        _check_same(config, folder)
    try:
        parts = prepare(config, folder, bases, processes)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"The base {config.base.path!r} does not fit into memory. {error}") from error
    if config.file.tell_captions:
        captions_told(parts.data.dataset.examples)  # an error now, rather than at the end of an epoch
    if not resume:
        folder.create(dump_toml(_pinned(config, parts.base.revision)))
    remove_partial(folder.path)
    recorder = Recorder(folder)
    try:
        for event in _events(parts, recorder, resume, should_stop, begin):
            recorder.record(event)
            yield event
    except Stopped:
        recorder.finish("stopped")
        raise
    except torch.OutOfMemoryError as error:
        message = (
            f"The {parts.device.type} device ran out of memory. Lower train.batch_size (now {config.train.batch_size}; "
            "raise train.gradient_accumulation_steps by the same factor), then data.resolution_px."
        )
        recorder.log(traceback.format_exc())
        recorder.finish("failed", message)
        raise OutOfMemoryError(message) from error
    except SdloraError as error:
        recorder.finish("failed", str(error))
        raise
    except Exception as error:
        recorder.log(traceback.format_exc())
        recorder.finish("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        parts.adapter.remove()
        processes.leave()
    recorder.finish("done")


# --- Going on where a run stopped -----------------------------------------------------------------------------------


def _pinned(config: RunConfig, revision: str | None) -> RunConfig:
    """The configuration with the commit that a hub id was resolved to, so that going on finds the same base."""
    if revision is None:
        return config
    return config.model_copy(update={"base": config.base.model_copy(update={"revision": revision})})


def _as_pinned(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration with the commit that the run was started on, unless it asks for a commit itself."""
    asks = config.base.revision is not None and re.fullmatch(r"[0-9a-f]{40}", config.base.revision)
    return config if asks else _pinned(config, load_config(str(folder.config)).base.revision)


def _check_same(config: RunConfig, folder: RunFolder) -> None:
    """A run goes on only with the settings it was started with.

    Raises:
        ConfigError: Any setting that matters differs; all are named with both values.
    """
    before = dict(options(load_config(str(folder.config))))
    different = [
        f"  {name}: was {before[name]!r}, now {value!r}"
        for name, value in options(config)
        if name not in FREE_WHEN_RESUMING and before[name] != value
    ]
    if different:
        raise ConfigError(f"The run in {folder.path} was started with other settings:\n" + "\n".join(different))


def _pictures(parts: Parts) -> dict[str, str]:
    """What is trained, preserved and held out, by name: a hash of pixels, caption and networks."""
    heldout = {} if parts.heldout is None else parts.heldout.data.identities()
    preserved = {} if parts.preserved is None else parts.preserved.identities()
    return parts.data.identities() | preserved | {f"held out: {name}": found for name, found in heldout.items()}


def _check_same_pictures(before: dict[str, str], now: dict[str, str]) -> None:
    """A run goes on only with the pictures it was started with, for which picture comes when depends on all of them.

    Raises:
        DataError: Any was added, taken away or changed; all are named.
    """
    kinds = {
        "added": sorted(now.keys() - before.keys()),
        "no longer there": sorted(before.keys() - now.keys()),
        "changed, or its caption": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    if any(kinds.values()):
        told = "\n".join(f"  {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        raise DataError(f"The run was started with other pictures. Put them back, or start a new run:\n{told}")


# --- The run itself ------------------------------------------------------------------------------------------------


def _events(
    parts: Parts, recorder: Recorder, resume: bool, should_stop: Callable[[], bool], begin: float
) -> Iterator[Event]:
    config, trainer, folder = parts.config, parts.trainer, parts.folder
    processes = trainer.processes
    plan = _plan(parts)
    yield plan
    for message in parts.notices:
        yield Notice(message)
    yield from _fill_training(parts)
    if parts.heldout is not None:
        yield from parts.heldout.data.fill(config.data.background)
    if parts.checker is not None:
        for progress in parts.checker.prepare(config.data.background):
            yield progress
            if should_stop():  # a large base takes minutes here; what was drawn is in the cache
                raise Stopped
    processes.agree("the cache is filled")
    losses: dict[int, float] = {}
    checkpoints = complete_checkpoints(folder.checkpoints) if resume else []
    processes.agree(checkpoints[-1:])
    if checkpoints:
        extra = load_checkpoint(checkpoints[-1], trainer)
        _check_same_pictures(extra["pictures"], _pictures(parts))
        recorder.cut_metrics(extra["metrics_bytes"])
        losses = {int(epoch): loss for epoch, loss in extra["heldout_losses"].items()}
        yield Notice(f"Resumed at step {trainer.position.step} of {trainer.total_steps}.")
    else:
        recorder.cut_metrics(0)
        yield from _close_epoch(parts, EpochDone(0, 0, None, None, 0.0), losses)
    processes.agree("training begins")
    last = config.train.epochs
    for event in trainer.events(should_stop):
        if isinstance(event, CheckpointDue):
            extra = {
                "metrics_bytes": recorder.metrics_bytes(),
                "heldout_losses": losses,
                "pictures": _pictures(parts),
            }
            save_checkpoint(folder.checkpoints, trainer, extra)
        elif isinstance(event, EpochDone):
            yield from _close_epoch(parts, event, losses)
            if processes.agree(config.copycheck.stop and _copies(folder, event.epoch)):
                last = event.epoch
                yield Notice(f"Epoch {last} copies training pictures; training ends here, as copycheck.stop asks for.")
                break
        else:
            yield event
    else:
        if trainer.position.step < trainer.total_steps:
            raise Stopped
    epoch, reason = recommend(read_checks(folder.path / "epochs"), losses, last)
    with atomic_path(folder.lora) as temporary:
        shutil.copyfile(folder.epoch_lora(epoch), temporary)
    proof = json.loads((folder.epoch(epoch) / "proof.json").read_text(encoding="utf-8"))
    yield Exported(str(folder.lora), epoch, proof["num_modules"], proof["max_error"], folder.lora.stat().st_size)
    yield Notice(reason)
    proven = f"The file was loaded back through diffusers; its greatest difference is {proof['max_error']:g}."
    limits = limits_elsewhere(config, proof)
    for message in limits:
        yield Notice(message)
    _report(parts, [reason, proven, *limits], kept=epoch)
    write_card(parts, plan, epoch)
    yield RunDone(str(folder.lora), str(folder.path), time.monotonic() - begin)


def _fill_training(parts: Parts) -> Iterator[Event]:
    background, trainer = parts.config.data.background, parts.trainer
    yield from parts.data.fill(background, trainer.plan.timesteps)
    if parts.preserved is not None:
        yield from parts.preserved.fill(background, trainer.preserved_plan.timesteps)


def _follow(config: RunConfig, folder: RunFolder, should_stop: Callable[[], bool], processes: Processes) -> None:
    """What a process other than the main one does: its share of every batch, and nothing that anybody sees.

    Raises:
        SdloraError: Bad input, or another process has ended.
        Stopped: The processes agreed to stop.
    """
    try:
        parts = prepare(config, folder, processes=processes)
        processes.agree("")
        for _ in _fill_training(parts):
            pass  # from the disk, where the main process has just put it
        for checkpoint in processes.agree(list[Path]()):
            load_checkpoint(checkpoint, parts.trainer)
        processes.agree("")
        for event in parts.trainer.events(should_stop):
            if isinstance(event, EpochDone) and processes.agree(False):
                return
    except ProcessLostError as error:
        if should_stop():  # the main process may stop where the others only wait
            raise Stopped from error
        raise
    finally:
        processes.leave()
    if parts.trainer.position.step < parts.trainer.total_steps:
        raise Stopped


def _plan(parts: Parts) -> PlanMade:
    config = parts.config
    examples = parts.data.dataset.examples
    sets = [
        PlannedSet(
            one.title,
            sum(example.name.startswith(f"{one.title}/") for example in examples),
            one.repeats or 1,
            (one.repeats or 1) * config.train.epochs,
        )
        for one in config.data.all_sets()
        if config.data.sets
    ]
    repeats = max(example.repeats for example in examples)
    heldout = () if parts.heldout is None else parts.heldout.data.dataset.examples
    peak_bytes, memory_bytes = memory_of_run(config, parts.base, parts.data, parts.device)
    return PlanMade(
        pictures=len(examples),
        heldout_pictures=len(heldout),
        split_off=[] if config.data.holdout is not None else [example.name for example in heldout],
        repeats=repeats,
        epochs=config.train.epochs,
        exposures_per_picture=repeats * config.train.epochs,
        batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        steps=parts.trainer.total_steps,
        trained_parameters=parts.adapter.num_parameters(),
        base_parameters=parts.adapter.num_base_parameters(),
        targets=list(config.lora.targets),
        device=str(parts.device),
        precision=parts.precision,
        sets=sets,
        preserved_pictures=0 if parts.preserved is None else len(parts.preserved.dataset.examples),
        peak_bytes=peak_bytes,
        memory_bytes=memory_bytes,
    )


def _close_epoch(parts: Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """What belongs to an epoch's end: held-out loss, the LoRA file, previews, the contact sheet, the page."""
    with parts.trainer.averaged():
        yield from _judge_epoch(parts, event, losses)


def _judge_epoch(parts: Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    folder = parts.folder
    if parts.heldout is not None:
        event = parts.heldout.measure(event)
        assert event.heldout_loss is not None, "it was just measured"
        losses[event.epoch] = event.heldout_loss
    yield event
    if event.epoch > 0:
        export_epoch(parts, event)
    if parts.previews is not None:
        if parts.checker is not None:
            yield from parts.checker.epoch(event.epoch, folder.epoch(event.epoch), folder.epoch(0))
        else:
            yield from draw_epoch(parts.base, parts.previews, event.epoch, folder.epoch(event.epoch))
        _write_sheet(parts, parts.previews, event.epoch)
        if event.epoch > 0 and parts.config.file.thumbnail:
            add_thumbnail(folder.epoch_lora(event.epoch), parts.previews, folder.epoch(event.epoch))
    done = f"Epoch {event.epoch} of {parts.config.train.epochs}" if event.epoch else "The base, before training"
    _report(parts, [f"{done}. This page is written anew after every epoch."])


def _report(parts: Parts, sentences: list[str], kept: int | None = None) -> None:
    folder = parts.folder
    report = Report(
        title=folder.name,
        sentences=sentences,
        epochs=folder.path / "epochs",
        sheet=folder.sheet,
        metrics=folder.metrics,
        config=folder.config,
        gallery=Pixels(parts.data.dataset, parts.config.data.background),
        kept=kept,
    )
    write_report(folder.report, report)


def _copies(folder: RunFolder, epoch: int) -> bool:
    check = EpochCheck.read(folder.epoch(epoch))
    return epoch > 0 and check is not None and check.verdict == "copying"


def _write_sheet(parts: Parts, request: PreviewRequest, last_epoch: int) -> None:
    def files(epoch: int) -> list[Path]:
        return [parts.folder.epoch(epoch) / "previews" / name for name in request.file_names()]

    labels = [prompt for prompt in request.prompts for _ in request.seeds]
    columns = [("base" if epoch == 0 else f"epoch {epoch}", files(epoch)) for epoch in range(last_epoch + 1)]
    contact_sheet(labels, columns, parts.folder.sheet)
