"""Events and copy checks in words, for a person at a terminal.

Used by the progress bar and by `sdlora train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from sdlora import events
from sdlora.common.text import format_bytes
from sdlora.copycheck.verdict import EpochCheck

_VERDICT_STYLES = {"clean": "green", "watch": "yellow", "copying": "bold red"}


def describe_plan(plan: events.PlanMade) -> str:
    """What a run will train, a line for each fact."""
    return "\n".join(_plan_lines(plan))


def _plan_lines(plan: events.PlanMade) -> Iterator[str]:
    parts: list[events.PlannedSet | events.PlanMade] = [*plan.sets] or [plan]
    for part in parts:
        name = f"{part.name}: " if isinstance(part, events.PlannedSet) else ""
        yield (
            f"{name}{part.images} images x {part.repeats} repeats x {plan.epochs} epochs: "
            f"each image is seen {part.exposures_per_image} times."
        )
    images_per_step = plan.batch_size * plan.gradient_accumulation_steps
    yield f"{plan.steps} steps of {images_per_step} images on {plan.device} ({plan.precision})."
    if plan.prior_images:
        yield (
            f"Each step also trains as many of the {plan.prior_images} images of data.preservation_folder, "
            "which preserves what they show."
        )
    if plan.split_off:
        yield (
            f"{len(plan.split_off)} more images ({', '.join(plan.split_off)}) are only used to measure the validation "
            "loss. Set data.validation_split = false to train on them, too."
        )
    elif plan.validation_images:
        yield f"The validation loss is measured on {plan.validation_images} images of data.validation_folder."
    targets, share = ", ".join(plan.targets), plan.trained_parameters / plan.base_parameters
    yield (
        f"Training {plan.trained_parameters:,} parameters in {targets}: {share:.2%} of the base model's "
        f"{plan.base_parameters:,}, which stay frozen."
    )
    if plan.peak_bytes is not None and plan.memory_bytes is not None:
        need = f"Peak memory: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.memory_bytes)} free"
        fits = plan.peak_bytes <= plan.memory_bytes
        yield f"{need}." if fits else f"{need}, so it will probably run out. `sdlora plan` says what to change first."


def epoch_name(epoch: int) -> str:
    """An epoch as a person calls it; 0 is the base model."""
    return f"epoch {epoch}" if epoch else "base model"


def describe_losses(event: events.EpochDone) -> str | None:
    """An epoch's losses in one line; None if none were measured."""
    losses = [("training loss", event.train_loss), ("validation loss", event.validation_loss)]
    measured = [f"{label} {value:.5f}" for label, value in losses if value is not None]
    return f"{epoch_name(event.epoch)}: {', '.join(measured)}" if measured else None


def describe_check(event: events.CopyChecked) -> str:
    """A copy check in one line."""
    training, preview = event.most_similar
    return (
        f"{epoch_name(event.epoch)}: {event.verdict}, {event.share:.0%} of previews match (at least "
        f"{event.share_lower_bound:.0%}). Most similar: {preview} and {training}, {event.similarity:.2f}. "
        f"{event.reason}"
    )


def copy_table(checks: Mapping[int, EpochCheck]) -> Table:
    """The copy checks of a run, a row for each epoch."""
    table = Table(
        "epoch", "verdict", "matches", "most similar preview", "nearest image", "reason", box=None, pad_edge=False
    )
    for epoch, check in sorted(checks.items()):
        best, total = check.most_similar(), len(check.previews)
        found = sum(match.significant for match in check.previews)
        table.add_row(
            str(epoch) if epoch else "base",
            Text(check.verdict, style=_VERDICT_STYLES[check.verdict]),
            f"{found} of {total} (at least {check.share_lower_bound:.0%})",
            # File names may hold brackets, which would be read as styles.
            Text(f"{best.file.rpartition('/')[2]} ({best.similarity:.2f})"),
            Text(best.nearest),
            Text("" if check.verdict == "clean" else check.reason),
        )
    return table
