"""The end of an epoch: validation loss, LoRA file, previews with the copy check, contact sheet and page.

Called by the run for epoch 0, the base model before training, and after every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sdlora.data.dataset import Pixels
from sdlora.events import EpochDone, Event, Progress
from sdlora.previews.contact_sheet import contact_sheet
from sdlora.previews.sampler import PreviewRequest, draw_epoch
from sdlora.report.report import write_report
from sdlora.run.export import add_thumbnail, export_epoch
from sdlora.run.folder import RunFolder
from sdlora.run.setup import RunContext, hints_in


def close_epoch(context: RunContext, event: EpochDone, losses: dict[int, float]) -> Iterator[Event]:
    """Do all that belongs to an epoch's end, with the weights that are exported.

    Args:
        context: The run's.
        event: The epoch, without its validation loss.
        losses: Validation losses by epoch, to which this one is added.

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
    """Write the run's page.

    Args:
        context: The run's.
        sentences: What its top says.
        kept: The epoch whose file is the run's, once it is known.
    """
    folder = context.folder
    gallery = Pixels(context.data.dataset, context.config.data.background)
    write_report(folder.path, folder.name, sentences, gallery, kept)


def _draw_previews(context: RunContext, previews: PreviewRequest, epoch: int) -> Iterator[Event]:
    folder = context.folder
    if context.checker is not None:
        yield from context.checker.epoch(epoch, folder.epoch(epoch), folder.epoch(0))
    else:
        yield from draw_epoch(context.base, previews, epoch, folder.epoch(epoch))
    _write_sheet(folder, previews, epoch)
    if epoch > 0 and context.config.file.thumbnail:
        add_thumbnail(folder.epoch_lora(epoch), previews, folder.epoch(epoch))


def _write_sheet(folder: RunFolder, previews: PreviewRequest, last_epoch: int) -> None:
    def files(epoch: int) -> list[Path]:
        return [folder.epoch(epoch) / "previews" / name for name in previews.file_names()]

    labels = [prompt for prompt in previews.prompts for _ in previews.seeds]
    columns = [("base" if epoch == 0 else f"epoch {epoch}", files(epoch)) for epoch in range(last_epoch + 1)]
    contact_sheet(labels, columns, folder.sheet)
