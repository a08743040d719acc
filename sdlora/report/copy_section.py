"""What a page says of copying: the epoch that is judged, a row for every epoch, and how every sign developed.

Images are in `comparisons`; the words of the verdicts are in `templates/parts.html`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sdlora.common.metrics import Metrics
from sdlora.common.text import format_range
from sdlora.copycheck.verdict import ALPHA, CONFIDENCE, EpochCheck, Match
from sdlora.report.charts import COLORS, GREY, Line, line_chart
from sdlora.report.html import Figure

Checks = Mapping[int, EpochCheck]

VERDICT_COLORS = {"clean": "#1b6e3c", "watch": "#7a4b00", "copying": "#a3122b"}
"""The page's own colours of the verdicts, for charts."""

_SIGNALS = {
    "self_retrieval": ("Captions lead back to their own images", "self-retrieval"),
    "train_heldout_gap": ("Better on training than on validation images", "training-validation gap"),
    "seed_collapse": ("Similarity between seeds", "seed collapse"),
    "guidance_norm": ("Strength of the prompt's guidance", "guidance norm"),
    "concept_fidelity": ("Concept fidelity, as DINOv2 sees it", "concept fidelity"),
    "registered_likeness": ("Similarity after alignment", "aligned similarity"),
}
_KINDS = (("training", "captions", COLORS[3]), ("novel", "new", COLORS[1]))


class EpochRow(NamedTuple):
    """An epoch, of which 0 is the base model, in a row of a table."""

    epoch: int
    check: EpochCheck | None
    exposures: str  # of each image by then: a number or a range
    validation_loss: float | None
    is_kept: bool  # whether its file is the run's

    @property
    def num_matches(self) -> int:
        """How many previews match a training image."""
        return 0 if self.check is None else sum(match.significant for match in self.check.previews)


def judged_epoch(checks: Checks, kept: int | None) -> int:
    """The epoch whose verdict stands on top: the one that is kept, or the latest while that is open."""
    return kept if kept in checks and kept is not None else max(checks)


def epoch_rows(checks: Checks, metrics: Metrics, kept: int | None) -> list[EpochRow]:
    """A row for every epoch; `kept` is the one whose file is the run's."""
    names = {name for event in metrics.steps for name in event.examples}
    rows = []
    for done in metrics.epochs:
        counts = Counter(name for event in metrics.steps if event.epoch <= done.epoch for name in event.examples)
        exposures = format_range(min((counts[name] for name in names), default=0), max(counts.values(), default=0))
        check = checks.get(done.epoch)
        rows.append(EpochRow(done.epoch, check, exposures, done.validation_loss, done.epoch == kept))
    return rows


def copy_figures(checks: Checks) -> list[Figure]:
    """Charts by epoch: matches, similarity, and every signal with its meaning."""
    epochs = sorted(checks)
    found = [checks[epoch] for epoch in epochs]
    matches = [
        Line("at least", [check.share_lower_bound for check in found], GREY),
        Line("found", [check.share for check in found], COLORS[1]),
    ]
    signals = dict.fromkeys(name for check in found for name in check.signals)
    return [
        _figure(
            "Previews that match", matches, epochs, "share of previews",
            f"The share of previews that match a training image, and its lower bound with {CONFIDENCE:.1%} confidence. "
            f"An epoch is called copying where the bound is above {ALPHA:.0%}.",
        ),
        _figure(
            "Most similar preview", _similarity(found, best=True), epochs, "similarity (1 = copy)",
            "The preview most similar to a training image, for training captions and for new prompts.",
        ),
        _figure(
            "Mean over all previews", _similarity(found, best=False), epochs, "mean similarity (1 = copy)",
            "Similarity grows with learning; where it jumps for new prompts, copying begins.",
        ),
        *(_signal_figure(name, found, epochs) for name in signals),
    ]  # fmt: skip


def _similarity(found: Sequence[EpochCheck], *, best: bool) -> list[Line]:
    def of(previews: Sequence[Match], kind: str) -> float | None:
        values = [match.similarity for match in previews if match.kind == kind]
        return (max(values) if best else sum(values) / len(values)) if values else None

    return [Line(label, [of(check.previews, kind) for check in found], color) for kind, label, color in _KINDS]


def _signal_figure(name: str, found: Sequence[EpochCheck], epochs: Sequence[int]) -> Figure:
    values = [check.signals[name]["value"] if name in check.signals else None for check in found]
    latest = next(check.signals[name] for check in reversed(found) if name in check.signals)
    label = "" if latest["value"] is None else f"{latest['value']:.3g}"
    note = latest["meaning"]
    if latest["p_value"] is not None:
        note += f" p-value {latest['p_value']:.2g}: {'' if latest['outside'] else 'not '}significant."
    title, y_name = _SIGNALS.get(name, (name.replace("_", " "), name.replace("_", " ")))
    return _figure(title, [Line(label, values, COLORS[2])], epochs, y_name, note)


def _figure(title: str, lines: Sequence[Line], epochs: Sequence[int], y_name: str, note: str) -> Figure:
    return Figure(title, line_chart(lines, epochs, x_name="epoch", y_name=y_name), note)
