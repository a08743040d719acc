"""What the page says of copying: the verdict on top, and how every sign of it went from epoch to epoch.

Images are in `comparisons`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from sdlora.copycheck.verdict import ALPHA, CONFIDENCE, EpochCheck, Match
from sdlora.events import EpochDone, StepDone
from sdlora.report.charts import COLORS, Line, line_chart
from sdlora.report.html import figure, table

Checks = Mapping[int, EpochCheck]

# Each with a mark of its own: the colour alone would say nothing to many eyes.
_WORDS = {
    "clean": ("✓", "clean", "No copying found"),
    "watch": ("!", "watch", "First signs of copying"),
    "copying": ("✕", "copying", "Copies training images"),
}
_SIGNALS = {
    "self_retrieval": "Finds its way back to its own images",
    "train_heldout_gap": "Better on training images than on others",
    "seed_collapse": "All seeds look alike",
    "guidance_norm": "How hard a prompt pulls",
    "concept_fidelity": "The concept, as DINOv2 sees it",
}
_KINDS = (("training captions", "training", COLORS[3]), ("new prompts", "novel", COLORS[1]))


def once_in(chance: float) -> str:
    """A probability in words, such as "once in 370"."""
    return "almost always" if chance > 2 / 3 else f"once in {round(1 / max(chance, 1e-9)):,}"


def in_one_of(chance: float) -> str:
    """The same for an image, such as "in 1 of 145 images"."""
    return "in most images" if chance > 2 / 3 else f"in 1 of {round(1 / max(chance, 1e-9)):,} images"


VERDICT_COLORS = {"clean": "#1b6e3c", "watch": "#7a4b00", "copying": "#a3122b"}
"""The page's own colours of the verdicts, for charts."""


def word_chip(verdict: str) -> str:
    """A verdict in a word with its mark."""
    mark, word, _ = _WORDS[verdict]
    return f"<span class='chip {verdict}'>{mark} {word}</span>"


def verdict_chip(check: EpochCheck) -> str:
    """The verdict of a check in a word with its mark."""
    return word_chip(check.verdict)


def verdict_banner(checks: Checks, kept: int | None) -> str:
    """The verdict in words and colour, with its reason and what it is worth.

    Args:
        checks: By epoch, at least one.
        kept: The epoch whose file is the run's; None while that is open, and the latest one is judged.
    """
    epoch = max(checks) if kept is None or kept not in checks else kept
    check = checks[epoch]
    mark, _, words = _WORDS[check.verdict]
    which = "the one that is kept" if epoch == kept else "before training" if epoch == 0 else "the latest"
    return (
        f"<div class='verdict {check.verdict}'><strong>{mark} {words}</strong>"
        f"<p><b>{'The base' if epoch == 0 else f'Epoch {epoch}'}, {which}.</b> {html.escape(check.reason)}</p>"
        "<p class='quiet'>Previews no more like the set than its images are like one another are called copying "
        f"about {once_in(check.false_alarm_rate)}.</p>"
        "</div>"
    )


def epochs_at_a_glance(checks: Checks, epochs: Sequence[EpochDone], steps: Sequence[StepDone], kept: int | None) -> str:
    """A row for every epoch: verdict, previews that match, exposures so far, validation loss.

    Args:
        checks: By epoch.
        epochs: The epochs of the metrics.
        steps: Their steps.
        kept: The epoch whose file is the run's.
    """
    rows = []
    for event in epochs:
        epoch, loss, check = event.epoch, event.validation_loss, checks.get(event.epoch)
        verdict = share = ""
        if check is not None:
            verdict = verdict_chip(check)
            found = sum(match.significant for match in check.previews)
            share = f"{found} of {len(check.previews)} ({check.share:.0%})"
        name = f"{epoch or 'base'}{', kept' if epoch == kept else ''}"
        rows.append([name, verdict, share, _exposures(steps, epoch), "" if loss is None else f"{loss:.4f}"])
    shown = table("Epoch by epoch", ["epoch", "verdict", "matches", "seen", "validation loss"], rows)
    return (
        f"<div class='glance'>{shown}</div><p class='quiet'>Matches: previews more like a training image than chance "
        "explains. Seen: how often each image was trained on by then.</p>"
    )


def _exposures(steps: Sequence[StepDone], epoch: int) -> str:
    exposures = {name: 0 for event in steps for name in event.examples}
    for event in steps:
        if event.epoch <= epoch:
            for name in event.examples:
                exposures[name] += 1
    fewest, most = min(exposures.values(), default=0), max(exposures.values(), default=0)
    return str(most) if fewest == most else f"{fewest} to {most}"


def copy_figures(checks: Checks) -> str:
    """Charts by epoch: matches, similarity, and every signal with what it means."""
    epochs = sorted(checks)
    found = [checks[epoch] for epoch in epochs]
    figures = [
        _figure(
            "Previews that match",
            [
                Line("at least", [check.share_lower_bound for check in found], "#767676"),
                Line("found", [check.share for check in found], COLORS[1]),
            ],
            epochs, "share of previews",
            "How many previews are more like a training image than chance explains, and how many are so at least, "
            f"with a confidence of {CONFIDENCE:.1%}. Where that is above {ALPHA:.0%}, an epoch is called copying.",
        ),
        _figure(
            "The most alike preview", _similarity(found, best=True), epochs, "similarity (1 is a copy)",
            "The preview most like a training image: of those drawn from training captions, and from new prompts.",
        ),
        _figure(
            "All previews", _similarity(found, best=False), epochs, "mean similarity (1 is a copy)",
            "The same on average. Similarity grows with learning; where that of new prompts jumps, copying begins.",
        ),
    ]  # fmt: skip
    figures += [
        _signal_figure(name, found, epochs) for name in dict.fromkeys(n for check in found for n in check.signals)
    ]
    return f"<div class='charts'>{''.join(figures)}</div>"


def _similarity(found: Sequence[EpochCheck], *, best: bool) -> list[Line]:
    def of(previews: Sequence[Match], kind: str) -> float | None:
        values = [match.similarity for match in previews if match.kind == kind]
        return (max(values) if best else sum(values) / len(values)) if values else None

    labels = {"training": "captions", "novel": "new"}
    return [Line(labels[kind], [of(check.previews, kind) for check in found], color) for _, kind, color in _KINDS]


def _signal_figure(name: str, found: Sequence[EpochCheck], epochs: Sequence[int]) -> str:
    values = [check.signals[name]["value"] if name in check.signals else None for check in found]
    latest = next(check.signals[name] for check in reversed(found) if name in check.signals)
    label = "" if latest["value"] is None else f"{latest['value']:.3g}"
    sentence = latest["meaning"]
    if latest["p_value"] is not None:
        sentence += f" Chance gives as much {once_in(latest['p_value'])}: "
        sentence += "it stands out." if latest["outside"] else "nothing unusual."
    title = _SIGNALS.get(name, name.replace("_", " "))
    return _figure(title, [Line(label, values, COLORS[2])], epochs, name.replace("_", " "), sentence)


def _figure(title: str, lines: Sequence[Line], epochs: Sequence[int], y_name: str, sentence: str) -> str:
    return figure(title, line_chart(lines, epochs, x_name="epoch", y_name=y_name), sentence)
