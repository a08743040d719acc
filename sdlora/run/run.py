"""One run: from a configuration to a verified LoRA file, as an iterator of events.

The only place that knows the order of the stages. Callers read the events; bad input is found before the run's folder
is made.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from sdlora.common.files import disk_full_errors, remove_partial
from sdlora.common.locks import device_lock, take_turns
from sdlora.config.schema import RunConfig
from sdlora.config.schema_training import MAX_EPOCHS
from sdlora.config.toml import dump_toml
from sdlora.copycheck.verdict import EpochCheck, read_checks, recommend
from sdlora.errors import DivergedError, OutOfMemoryError, ProcessLostError, SdloraError
from sdlora.estimate.costs import step_seconds
from sdlora.estimate.hints import out_of_memory_message
from sdlora.events import (
    CheckpointDue,
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PlannedSet,
    PreviewsDue,
    Progress,
    RunDone,
    StepRehearsed,
)
from sdlora.run.epoch_end import close_epoch, draw_within_epoch, write_page
from sdlora.run.estimate import check_disks, memory_of_run
from sdlora.run.export import caption_metadata, export_run, limits_elsewhere, verified_how, write_card
from sdlora.run.folder import Recorder, RunFolder
from sdlora.run.lengthen import record_length, with_length
from sdlora.run.lora_inputs import with_settings_of_file
from sdlora.run.resume import (
    check_same_content,
    keep_locations,
    load_newest,
    other_versions,
    pinned,
    resumed_config,
    what_must_match,
)
from sdlora.run.setup import BaseSource, RunContext, choose_device, fresh_base, hints_in, prepare
from sdlora.run.trackers import Trackers, check_trackers
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
) -> Generator[Event, None, None]:
    """Run a configuration.

    Args:
        output: The run's folder.
        resume: Continue from the newest complete checkpoint in `output`.
        wait: Whether to wait for the GPU if another run is on it.
        should_stop: Asked between steps and in every long phase; True saves a checkpoint, if there is anything new in
            it, and ends the run with `Stopped`.
        bases: Where the base model comes from; the adapter is taken out of it at the end.

    Yields:
        The run's events, ending in `RunDone`.

    Raises:
        SdloraError: Bad input (before anything is written) or a failure during the run.
        Stopped: `should_stop` returned True.
    """
    begin = time.monotonic()
    config = with_settings_of_file(config)
    processes = join(config.train.device)
    folder = RunFolder(output, config.name or "lora")
    if not processes.is_main:
        _follow(config, folder, should_stop, processes, resume=resume)
        return
    folder.check(resume=resume)
    check_trackers(config.train.trackers)
    with ExitStack() as held:
        if resume:
            held.enter_context(folder.occupied("sdlora train"))
            config = processes.agree(resumed_config(config, folder))
        device, _, _ = choose_device(config.train.device, config.train.precision)
        lock = device_lock(device) if processes.alone else None
        if lock is not None:
            yield from take_turns(lock, f"sdlora train in {output}", held, wait=wait, should_stop=should_stop)
            if should_stop():
                raise Stopped
        context = _prepare(config, folder, bases, processes)
        check_disks(context, resume=resume)
        _check_cache(context)
        if not resume:
            held.enter_context(folder.occupied("sdlora train"))
            folder.check(resume=False)  # another run may have been here since
            folder.create(dump_toml(pinned(config, context.base.revision)))
        remove_partial(folder.path)
        remove_partial(context.loaded.cache.folder)
        tidy_checkpoints(folder.checkpoints)
        yield from _recorded(context, resume, should_stop, begin)


def _prepare(config: RunConfig, folder: RunFolder, bases: BaseSource, processes: Processes) -> RunContext:
    try:
        context = prepare(config, folder, bases, processes)
    except torch.OutOfMemoryError as error:
        message = out_of_memory_message(config, "load", config.data.resolutions(512)[-1])
        raise OutOfMemoryError(f"{message} {error}") from error
    if config.file.include_captions:
        caption_metadata(context.data.dataset.examples)  # raises now, and not at the end of an epoch
    return context


def _check_cache(context: RunContext) -> None:
    """Check that a cache that is read-only holds the images and captions of the run."""
    if not context.loaded.cache.is_writable:
        for _ in _fill_cache(context):
            pass


def _recorded(context: RunContext, resume: bool, should_stop: Callable[[], bool], begin: float) -> Iterator[Event]:
    """The run's events, each written to disk before it is yielded, as is how the run ends."""
    recorder, trackers = Recorder(context.folder), Trackers(context.config, context.folder)
    try:
        # Where memory runs out in nothing else, it is in training.
        with disk_full_errors(context.folder.path), hints_in("train", context):
            for event in _events(context, recorder, resume, should_stop, begin):
                recorder.record(event)
                if (failure := trackers.record(event)) is not None:
                    recorder.record(failure)
                    yield failure
                yield event
                if isinstance(event, Progress) and should_stop():
                    raise Stopped  # training itself stops after a step, with a checkpoint; all else is done again
    except (Stopped, KeyboardInterrupt, GeneratorExit):
        recorder.finish("stopped")
        raise
    except DivergedError as error:
        message = diverged_message(str(error), context.folder)
        recorder.finish("failed", message)
        raise DivergedError(message) from error
    except Exception as error:
        is_ours = isinstance(error, SdloraError)
        if not is_ours or isinstance(error, OutOfMemoryError):
            recorder.log(traceback.format_exc())
        recorder.finish("failed", str(error) if is_ours else f"{type(error).__name__}: {error}")
        raise
    finally:
        trackers.finish()
        context.adapter.remove()
        context.trainer.processes.leave()
    recorder.finish("done")


def diverged_message(message: str, folder: RunFolder) -> str:
    """What to say when the loss or the adapter is no longer finite: the cause, and the last epoch that is good."""
    whole = [number for number in range(1, MAX_EPOCHS + 1) if folder.epoch_lora(number).exists()]
    if not whole:
        return f"{message} No epoch was finished before."
    return f"{message} The last good epoch is kept: {folder.epoch_lora(whole[-1])}."


# --- The stages of a run -------------------------------------------------------------------------------------------


def _events(
    context: RunContext, recorder: Recorder, resume: bool, should_stop: Callable[[], bool], begin: float
) -> Iterator[Event]:
    trainer, losses = context.trainer, dict[int, float]()
    plan = _plan(context)
    yield plan
    for message in context.loaded.notices:
        yield Notice(message)
    with hints_in("cache", context):
        yield from _fill_cache(context)
    if not resume:
        context.base.offload()
        yield StepRehearsed(step_seconds(trainer, context.config.data.background))
    if context.checker is not None:
        with hints_in("preview", context):
            yield from context.checker.prepare(context.config.data.background)
    context.base.offload()
    trainer.processes.agree("the cache is filled")
    if (yield from _restore(context, recorder, losses, resume)):
        yield Notice(f"Resumed at step {trainer.position.step} of {trainer.total_steps}.")
    else:
        yield from close_epoch(context, EpochDone(0, 0, None, None, 0.0), losses)
    if (told := record_length(context.config, context.folder, trainer)) is not None:
        yield Notice(told)
    keep_locations(context.config, context.folder)
    trainer.processes.agree("training begins")
    last_epoch = yield from _train(context, recorder, losses, should_stop)
    epoch, reason = recommend(read_checks(context.folder.path / "epochs"), losses, last_epoch)
    yield from _export(context, epoch, reason)
    write_card(context, plan, epoch)
    yield RunDone(str(context.folder.lora), str(context.folder.path), time.monotonic() - begin)


def _fill_cache(context: RunContext) -> Iterator[Event]:
    yield from _fill_training_cache(context)
    if context.validation is not None:
        yield from context.validation.data.fill(context.config.data.background)


def _fill_training_cache(context: RunContext) -> Iterator[Event]:
    for term in context.trainer.terms:
        yield from term.loss.data.fill(context.config.data.background, term.schedule.timesteps)


def _restore(
    context: RunContext, recorder: Recorder, losses: dict[int, float], resume: bool
) -> Generator[Event, None, bool]:
    """Continue, if the run is resumed, from the newest checkpoint; else from the beginning. Returns which of both.

    Metrics are cut back to the checkpoint, and `losses` takes the validation losses of the epochs before.
    """
    checkpoints = complete_checkpoints(context.folder.checkpoints) if resume else []
    extra = load_newest(checkpoints, context.trainer, lambda extra: check_same_content(extra, context))
    if extra is None:
        recorder.cut_metrics(0)
        return False
    for told in (other_versions(extra), recorder.cut_metrics(extra["metrics_bytes"])):
        if told is not None:
            yield Notice(told)
    losses.update((int(epoch), loss) for epoch, loss in extra["heldout_losses"].items())
    return True


def _train(
    context: RunContext, recorder: Recorder, losses: dict[int, float], should_stop: Callable[[], bool]
) -> Generator[Event, None, int]:
    """Train to the end, save checkpoints, close every epoch, and return the last; `Stopped` if it was not reached."""
    trainer, config = context.trainer, context.config
    for event in trainer.events(should_stop):
        if isinstance(event, CheckpointDue):
            extra = {"metrics_bytes": recorder.metrics_bytes(), "heldout_losses": losses, **what_must_match(context)}
            save_checkpoint(context.folder.checkpoints, trainer, extra)
        elif isinstance(event, PreviewsDue):
            yield from draw_within_epoch(context, event)
            trainer.processes.agree("the previews are drawn")
        elif isinstance(event, EpochDone):
            yield from close_epoch(context, event, losses)
            check = EpochCheck.read(context.folder.epoch(event.epoch)) if config.copycheck.stop else None
            if trainer.processes.agree(check is not None and check.verdict == "copying"):
                yield Notice(
                    f"Epoch {event.epoch} copies training images; training ends here, as copycheck.stop asks for."
                )
                return event.epoch
        else:
            yield event
    if trainer.position.step < trainer.total_steps:
        raise Stopped
    return config.train.epochs


def _export(context: RunContext, epoch: int, reason: str) -> Iterator[Event]:
    """Make the recommended epoch's file the run's, and say what there is to know about it."""
    folder = context.folder
    export_run(folder, epoch)
    proof = json.loads((folder.epoch(epoch) / "proof.json").read_text(encoding="utf-8"))
    yield Exported(str(folder.lora), epoch, proof["num_modules"], proof["max_error"], folder.lora.stat().st_size)
    limits = limits_elsewhere(context.config, proof)
    for message in (reason, *limits):
        yield Notice(message)
    write_page(context, [reason, verified_how(proof), *limits], kept=epoch)


def _follow(
    config: RunConfig, folder: RunFolder, should_stop: Callable[[], bool], processes: Processes, *, resume: bool
) -> None:
    """Take part in a run as a process other than the main one: compute a share of every batch, write nothing."""
    try:
        if resume:
            config = with_length(config, processes.agree(config), folder)
        context = prepare(config, folder, processes=processes)
        processes.agree("")
        for _ in _fill_training_cache(context):
            pass  # from the disk, where the main process has just put it
        context.base.offload()
        load_newest([], context.trainer)
        processes.agree("")
        for event in context.trainer.events(should_stop):
            if isinstance(event, PreviewsDue):
                processes.agree("")
            if isinstance(event, EpochDone) and processes.agree(False):
                return
    except ProcessLostError as error:
        if should_stop():  # the main process may stop where the others only wait
            raise Stopped from error
        raise
    finally:
        processes.leave()
    if context.trainer.position.step < context.trainer.total_steps:
        raise Stopped


def _plan(context: RunContext) -> PlanMade:
    config, images, trainer = context.config, context.loaded.images, context.trainer
    examples, epochs = images.training.examples, config.train.epochs
    repeats = max(example.repeats for example in examples)
    validation = () if images.validation is None else images.validation.examples
    peak_bytes, memory_bytes = memory_of_run(context)
    return PlanMade(
        images=len(examples),
        validation_images=len(validation),
        split_off=[] if config.data.validation_folder is not None else [example.name for example in validation],
        repeats=repeats,
        epochs=epochs,
        exposures_per_image=repeats * epochs,
        batch_size=config.train.batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        steps=trainer.total_steps,
        trained_parameters=trainer.adapter.num_parameters(),
        base_parameters=trainer.adapter.num_base_parameters(),
        targets=list(config.lora.targets),
        device=str(context.loaded.device),
        precision=context.loaded.precision,
        sets=[
            PlannedSet(
                one.name,
                sum(example.name.startswith(one.prefix) for example in examples),
                one.repeats,
                one.repeats * epochs,
            )
            for one in config.data.sets
            if one.name is not None
        ],
        prior_images=0 if images.prior is None else len(images.prior.examples),
        peak_bytes=peak_bytes,
        memory_bytes=memory_bytes,
        previews=context.num_previews,
        previews_every_steps=trainer.settings.preview_every_steps,
    )
