"""The end of an epoch, and previews within one: validation loss, file, previews, copy check, the run's page.

Called by `run` for what the trainer tells; nothing here changes the weights.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from sdlora.data.dataset import Pixels
from sdlora.events import EpochDone, Event, PreviewsDone, PreviewsDue, Progress
from sdlora.previews.index import write_index
from sdlora.previews.sampler import PreviewRequest, contact_sheet, draw_epoch, draw_files
from sdlora.report.report import write_report
from sdlora.run.export import add_thumbnail, export_epoch
from sdlora.run.lengthen import told_lengthenings
from sdlora.run.setup import RunContext, hints_in


def close_epoch(context: RunContext, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """Do all that belongs to an epoch's end, with the weights that are exported.

    Its validation loss is added to `losses`, by epoch.

    Yields:
        The event with its validation loss, then the events of what is drawn and checked.
    """
    with context.trainer.averaged(), _as_base(context, event.epoch):
        if context.validation is not None:
            event = context.validation.measure(event)
            assert event.validation_loss is not None, "measure fills it in"
            losses[event.epoch] = event.validation_loss
        yield event
        if event.epoch > 0:
            with hints_in("export", context):
                export_epoch(context, event)
        if context.previews is not None:
            with hints_in("preview", context):
                yield from _draw_previews(context, context.previews, event.epoch)
        context.base.offload()
        done = f"Epoch {event.epoch} of {context.config.train.epochs}" if event.epoch else "The base, before training"
        write_page(context, [f"{done}. This page is written anew after every epoch."])
        yield Progress("page", 1, 1)


def _as_base(context: RunContext, epoch: int) -> AbstractContextManager[None]:
    """Epoch 0 is the base model, even where training starts at an adapter that changes it."""
    return context.adapter.disabled() if epoch == 0 and context.config.lora.from_file else nullcontext()


def write_page(context: RunContext, sentences: list[str], kept: int | None = None) -> None:
    """Write the run's page, with sentences at its top, and the epoch whose file is the run's, once it is known."""
    folder = context.folder
    gallery = Pixels(context.data.dataset, context.config.data.background)
    told = told_lengthenings(context.config, folder)
    write_report(folder.path, folder.name, [*sentences, *told], gallery, kept)


def draw_within_epoch(context: RunContext, event: PreviewsDue) -> Iterator[Event]:
    """Draw all previews with the weights of a step into its folder; nothing is compared."""
    start, folder = time.monotonic(), context.folder.step(event.step)
    with context.trainer.averaged(), hints_in("preview", context):
        files = yield from _draw_all(context, context.drawn, folder, "previews within an epoch")
    context.base.offload()
    yield PreviewsDone(event.epoch, files, time.monotonic() - start, event.step)


def _draw_all(
    context: RunContext, requests: Sequence[PreviewRequest], folder: Path, phase: str
) -> Generator[Event, None, list[str]]:
    """Draw requests, each at its strength of the LoRA, and return their files."""
    for request in requests:
        with context.adapter.at_strength(request.lora_scale):
            yield from draw_files(context.base, request, folder, phase)
    return [str(folder / "previews" / name) for request in requests for name in request.file_names()]


def _draw_previews(context: RunContext, previews: PreviewRequest, epoch: int) -> Iterator[Event]:
    folder = context.folder
    if epoch == 0:
        write_index(folder.path, previews, context.further)
    if context.checker is not None:
        yield from context.checker.epoch(epoch, folder.epoch(epoch), folder.epoch(0))
    else:
        yield from draw_epoch(context.base, previews, epoch, folder.epoch(epoch))
    if context.further:
        start = time.monotonic()
        files = yield from _draw_all(context, context.further, folder.epoch(epoch), "further previews")
        yield PreviewsDone(epoch, files, time.monotonic() - start)
    titles = ["base", *(f"epoch {number}" for number in range(1, epoch + 1))]
    names = [name for request in context.drawn for name in request.file_names()]
    drawn = [[folder.epoch(i) / "previews" / name for name in names] for i in range(epoch + 1)]
    labels = [label for request in context.drawn for label in request.labels()]
    contact_sheet(labels, list(zip(titles, drawn, strict=True)), folder.sheet)
    if epoch > 0 and context.config.file.thumbnail:
        add_thumbnail(folder.epoch_lora(epoch), previews, folder.epoch(epoch))
