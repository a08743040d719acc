"""One run: from a configuration to a proven LoRA file, as an iterator of events.

The only place that knows the order of things. The faces call `start` and read the events; what is wrong
with the input is found before the run's folder is made.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from sdlora.common.device_lock import device_lock, take_turns
from sdlora.common.files import atomic_path, naming_a_full_disk, remove_partial
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml
from sdlora.copycheck.verdict import EpochCheck, read_checks, recommend
from sdlora.data.dataset import Pixels
from sdlora.errors import DivergedError, OutOfMemoryError, ProcessLostError, SdloraError
from sdlora.estimate.hints import out_of_memory_message
from sdlora.estimate.timing import step_seconds
from sdlora.events import (
    CheckpointDue,
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PlannedSet,
    Progress,
    RunDone,
    StepRehearsed,
)
from sdlora.previews.contact_sheet import contact_sheet
from sdlora.previews.sampler import PreviewRequest, draw_epoch
from sdlora.report.report import Report, write_report
from sdlora.run.compatibility import limits_elsewhere
from sdlora.run.estimate import check_disks, memory_of_run
from sdlora.run.export import add_thumbnail, captions_told, export_epoch
from sdlora.run.failure_hints import diverged_message, hints_in
from sdlora.run.folder import Recorder, RunFolder
from sdlora.run.model_card import write_card
from sdlora.run.resume import as_pinned, check_same, check_same_content, images_of, load_newest, pinned
from sdlora.run.setup import BaseSource, Parts, choose_device, fresh_base, prepare
from sdlora.training.checkpoint import complete_checkpoints, save_checkpoint, tidy_checkpoints
from sdlora.training.distributed import Processes, join


class Stopped(Exception):
    """The user asked the run to stop; its checkpoint is written and it can be resumed."""


def start(
    config: RunConfig,
    output: Path,
    *,
    resume: bool = False,
    wait: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    bases: BaseSource = fresh_base,
) -> Iterator[Event]:
    """Run a configuration.

    Args:
        config: What to do.
        output: The run's folder.
        resume: Go on from the newest complete checkpoint in `output`.
        wait: Whether to wait for the GPU if another run is on it.
        should_stop: Asked between steps and in every long phase; True saves a checkpoint, if there is anything new in
            it, and ends the run with `Stopped`.
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
    with ExitStack() as held:
        if resume:
            held.enter_context(folder.occupied("sdlora train"))
            config = as_pinned(config, folder)
            check_same(config, folder)
        lock = device_lock(choose_device(config)[0]) if processes.alone else None
        if lock is not None:
            yield from take_turns(lock, f"sdlora train in {output}", held, wait=wait, should_stop=should_stop)
            if should_stop():
                raise Stopped
        try:
            parts = prepare(config, folder, bases, processes)
        except torch.OutOfMemoryError as error:
            message = out_of_memory_message(config, "load", config.data.resolution_px or 512)
            raise OutOfMemoryError(f"{message} {error}") from error
        if config.file.include_captions:
            captions_told(parts.data.dataset.examples)  # an error now, rather than at the end of an epoch
        check_disks(parts, resume=resume)
        if not resume:
            held.enter_context(folder.occupied("sdlora train"))
            folder.check(resume=False)  # another run may have been here since
            folder.create(dump_toml(pinned(config, parts.base.revision)))
        remove_partial(folder.path)
        remove_partial(parts.data.cache.folder)
        tidy_checkpoints(folder.checkpoints)
        yield from _recorded(parts, resume, should_stop, begin)


def _recorded(parts: Parts, resume: bool, should_stop: Callable[[], bool], begin: float) -> Iterator[Event]:
    """The run's events, each on the disk before anyone sees it, and so is how the run ends."""
    recorder = Recorder(parts.folder)
    try:
        # Where memory runs out in nothing else, it is in training.
        with naming_a_full_disk(parts.folder.path), hints_in("train", parts):
            for event in _events(parts, recorder, resume, should_stop, begin):
                recorder.record(event)
                yield event
                if isinstance(event, Progress) and should_stop():
                    raise Stopped  # training itself stops after a step, with a checkpoint; all else is done again
    except Stopped:
        recorder.finish("stopped")
        raise
    except OutOfMemoryError as error:
        recorder.log(traceback.format_exc())
        recorder.finish("failed", str(error))
        raise
    except DivergedError as error:
        message = diverged_message(str(error), parts.folder)
        recorder.finish("failed", message)
        raise DivergedError(message) from error
    except SdloraError as error:
        recorder.finish("failed", str(error))
        raise
    except Exception as error:
        recorder.log(traceback.format_exc())
        recorder.finish("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        parts.adapter.remove()
        parts.trainer.processes.leave()
    recorder.finish("done")


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
    with hints_in("cache", parts):
        yield from _fill_training(parts)
        if parts.validation is not None:
            yield from parts.validation.data.fill(config.data.background)
    if not resume:
        parts.base.set_aside()
        yield StepRehearsed(step_seconds(trainer, config.data.background))
    if parts.checker is not None:
        with hints_in("preview", parts):
            yield from parts.checker.prepare(config.data.background)
    parts.base.set_aside()
    processes.agree("the cache is filled")
    losses: dict[int, float] = {}
    extra = load_newest(complete_checkpoints(folder.checkpoints) if resume else [], trainer)
    if extra is not None:
        check_same_content(extra, parts)
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
                "pictures": images_of(parts),
                "base": parts.identity,
            }
            save_checkpoint(folder.checkpoints, trainer, extra)
        elif isinstance(event, EpochDone):
            yield from _close_epoch(parts, event, losses)
            if processes.agree(config.copycheck.stop and _copies(folder, event.epoch)):
                last = event.epoch
                yield Notice(f"Epoch {last} copies training images; training ends here, as copycheck.stop asks for.")
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
    for term in parts.trainer.terms:
        yield from term.loss.data.fill(parts.config.data.background, term.schedule.timesteps)


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
        parts.base.set_aside()
        load_newest([], parts.trainer)
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
            one.name,
            sum(example.name.startswith(one.prefix) for example in examples),
            one.repeats,
            one.repeats * config.train.epochs,
        )
        for one in config.data.sets
        if one.name is not None
    ]
    repeats = max(example.repeats for example in examples)
    validation = () if parts.validation is None else parts.validation.data.dataset.examples
    peak_bytes, memory_bytes = memory_of_run(parts)
    return PlanMade(
        images=len(examples),
        validation_images=len(validation),
        split_off=[] if config.data.validation_folder is not None else [example.name for example in validation],
        repeats=repeats,
        epochs=config.train.epochs,
        exposures_per_image=repeats * config.train.epochs,
        batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        steps=parts.trainer.total_steps,
        trained_parameters=parts.adapter.num_parameters(),
        base_parameters=parts.adapter.num_base_parameters(),
        targets=list(config.lora.targets),
        device=str(parts.device),
        precision=parts.precision,
        sets=sets,
        prior_images=0 if parts.prior is None else len(parts.prior.dataset.examples),
        peak_bytes=peak_bytes,
        memory_bytes=memory_bytes,
        previews=0 if parts.previews is None else len(parts.previews.wanted()),
    )


def _close_epoch(parts: Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """What belongs to an epoch's end: validation loss, the LoRA file, previews, the contact sheet, the page."""
    with parts.trainer.averaged():
        yield from _judge_epoch(parts, event, losses)


def _judge_epoch(parts: Parts, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    folder = parts.folder
    if parts.validation is not None:
        event = parts.validation.measure(event)
        assert event.validation_loss is not None, "it was just measured"
        losses[event.epoch] = event.validation_loss
    yield event
    if event.epoch > 0:
        with hints_in("export", parts):
            export_epoch(parts, event)
    if parts.previews is not None:
        with hints_in("preview", parts):
            if parts.checker is not None:
                yield from parts.checker.epoch(event.epoch, folder.epoch(event.epoch), folder.epoch(0))
            else:
                yield from draw_epoch(parts.base, parts.previews, event.epoch, folder.epoch(event.epoch))
        _write_sheet(parts, parts.previews, event.epoch)
        if event.epoch > 0 and parts.config.file.thumbnail:
            add_thumbnail(folder.epoch_lora(event.epoch), parts.previews, folder.epoch(event.epoch))
    parts.base.set_aside()
    done = f"Epoch {event.epoch} of {parts.config.train.epochs}" if event.epoch else "The base, before training"
    _report(parts, [f"{done}. This page is written anew after every epoch."])
    yield Progress("page", 1, 1)


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
