"""The end of an epoch: validation loss, LoRA file, previews with the copy check, contact sheet and page.

Called by the run for epoch 0, the base model before training, and after every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

from sdlora.data.dataset import Pixels
from sdlora.events import EpochDone, Event, Progress
from sdlora.previews.sampler import PreviewRequest, contact_sheet, draw_epoch
from sdlora.report.report import write_report
from sdlora.run.export import add_thumbnail, export_epoch
from sdlora.run.setup import RunContext, hints_in


def close_epoch(context: RunContext, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """Do all that belongs to an epoch's end, with the weights that are exported.

    Its validation loss is added to `losses`, by epoch.

    Yields:
        The event with its validation loss, then the events of what is drawn and checked.
    """
    with context.trainer.averaged():
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


def write_page(context: RunContext, sentences: list[str], kept: int | None = None) -> None:
    """Write the run's page, with sentences at its top, and the epoch whose file is the run's, once it is known."""
    folder = context.folder
    gallery = Pixels(context.data.dataset, context.config.data.background)
    write_report(folder.path, folder.name, sentences, gallery, kept)


def _draw_previews(context: RunContext, previews: PreviewRequest, epoch: int) -> Iterator[Event]:
    folder = context.folder
    if context.checker is not None:
        yield from context.checker.epoch(epoch, folder.epoch(epoch), folder.epoch(0))
    else:
        yield from draw_epoch(context.base, previews, epoch, folder.epoch(epoch))
    titles = ["base", *(f"epoch {number}" for number in range(1, epoch + 1))]
    drawn = [[folder.epoch(i) / "previews" / name for name in previews.file_names()] for i in range(epoch + 1)]
    labels = [prompt for prompt, _ in previews.wanted()]
    contact_sheet(labels, list(zip(titles, drawn, strict=True)), folder.sheet)
    if epoch > 0 and context.config.file.thumbnail:
        add_thumbnail(folder.epoch_lora(epoch), previews, folder.epoch(epoch))
