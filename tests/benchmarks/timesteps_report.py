"""Tables and plots of docs/measurements/timesteps.md from finished cells; the words around them are written by hand.

Every table stands between two marks in the page, and what is between them is replaced. Cells that are not there yet
are left out, and each table says how many pairs of runs it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from concepts import CONCEPTS
from estimates import Estimate, copies_saved, paired_interval, steps_to_reach
from results import read
from variants import REFERENCE, variants

matplotlib.use("svg")
# The same results give the same file: no dates, no random identifiers.
matplotlib.rcParams.update({"svg.hashsalt": "sdlora", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})  # fmt: skip
from matplotlib import pyplot  # noqa: E402

Rows = list[dict[str, Any]]
Pair = tuple[str, int]
Runs = dict[str, dict[Pair, dict[str, Any]]]
"""Variant to (concept, seed) to its figures."""


def write(results: Path, docs: Path) -> None:
    """Fill the tables of docs/measurements/timesteps.md and draw its plots."""
    rows = read(results)
    page = docs / "timesteps.md"
    text = page.read_text(encoding="utf-8")
    tables: dict[str, Callable[[Rows], list[str]]] = {
        "noise": noise_table, "levels": levels_table, "loss": loss_table, "bands": bands_table, "copies": copies_table,
        "overhead": overhead_table,
    }  # fmt: skip
    plots = {
        "levels": (plot_noise, "Times less gradient noise, by batch size"),
        "loss": (plot_loss, "Change of the validation loss, by variant"),
        "copies": (plot_copies, "Copy rate over fidelity, a point per epoch"),
    }
    for name, make in tables.items():
        lines = make(rows)
        figure = plots[name][0](rows) if name in plots else None
        if figure is not None:
            figure.savefig(docs / f"timesteps_{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close(figure)
            lines += ["", f"![{plots[name][1]}](timesteps_{name}.svg)"]
        text = between(text, name, "\n".join(lines))
    page.write_text(text, encoding="utf-8")


def between(text: str, name: str, table: str) -> str:
    """A page with a new table between the marks of that name.

    Raises:
        ValueError: The marks are not there, each once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"The page must hold {begin} and {end}, once each.")
    return text[: text.index(begin) + len(begin)] + f"\n{table}\n" + text[text.index(end) :]


def runs(rows: Rows, part: str) -> Runs:
    """The figures of a part, in the order of the variants, whatever order they were measured in."""
    mine = [row for row in rows if row["cell"]["part"] == part]
    return {
        name: {(row["cell"]["concept"], row["cell"]["seed"]): row for row in mine if row["cell"]["variant"] == name}
        for name in variants(1)
        if any(row["cell"]["variant"] == name for row in mine)
    }


def shared_pairs(found: Runs, variant: str) -> list[Pair]:
    """The (concept, seed) that both a variant and the reference were trained on."""
    return sorted(set(found.get(variant, {})) & set(found.get(REFERENCE, {})))


def _signed(estimate: Estimate, digits: int = 1) -> str:
    return f"{estimate.value:+.{digits}f} ({estimate.low:+.{digits}f} to {estimate.high:+.{digits}f})"


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    if not body:
        return ["*Not measured yet.*"]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


# --- Gradient noise ------------------------------------------------------------------------------------------------


def noise_table(rows: Rows) -> list[str]:
    """The noise ratio of single batches, by concept, batch size and coverage."""
    found = {
        (row["cell"]["concept"], row["cell"]["batch_size"], row["cell"]["coverage"]): Estimate(*row["batch"])
        for row in rows
        if row["cell"]["part"] == "noise"
    }
    body = []
    for concept in CONCEPTS:
        for size in sorted({key[1] for key in found if key[0] == concept}):
            cells = [found.get((concept, size, coverage)) for coverage in ("none", "batch", "image")]
            texts = ["" if e is None else f"{e.value:.1f} ({e.low:.1f} to {e.high:.1f})" for e in cells]
            body.append([concept, str(size), *texts])
    return _table(["Concept", "Batch", "none", "batch", "image"], body)


def level_gains(rows: Rows) -> dict[str, dict[str, dict[int, Estimate]]]:
    """How many times less noise there is than by chance: concept, coverage and batch size to the figure."""
    return {
        row["cell"]["concept"]: {
            coverage: {int(size): Estimate(*gain) for size, gain in sizes.items()}
            for coverage, sizes in row["gains"].items()
        }
        for row in sorted(rows, key=lambda row: list(CONCEPTS).index(row["cell"]["concept"]))
        if row["cell"]["part"] == "levels"
    }


def levels_table(rows: Rows) -> list[str]:
    """How many times less noise the plans' own meetings of timesteps make, by concept, batch size and coverage."""
    body = []
    for concept, gains in level_gains(rows).items():
        for size in gains["image"]:
            texts = [f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (gains[c][size] for c in gains)]
            body.append([concept, str(size), *texts])
    return _table(["Concept", "Batch", "batch", "image"], body)


def plot_noise(rows: Rows) -> Any:
    """Times less noise under image coverage, by batch size, a line per concept."""
    figure, axis = pyplot.subplots(figsize=(4.5, 2.6))
    found = level_gains(rows)
    for place, (concept, gains) in enumerate(found.items()):
        sizes = list(gains["image"])
        values = list(gains["image"].values())
        axis.errorbar(
            [math.log2(size) + 0.06 * (place - 1.5) for size in sizes], [gain.value for gain in values],
            [[gain.value - gain.low for gain in values], [gain.high - gain.value for gain in values]],
            marker="osD^"[place], markersize=4, linewidth=1, capsize=2, label=concept,
        )  # fmt: skip
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(xlabel="batch size", ylabel="times less noise\nthan by chance", xticks=range(1, 4), xticklabels=(2, 4, 8))
    if found:
        axis.legend(frameon=False)
    return _kept(figure, bool(found))


def _kept(figure: Any, drawn: bool) -> Any:
    if drawn:
        return figure
    pyplot.close(figure)
    return None


# --- Validation loss -------------------------------------------------------------------------------------------------


def mean_curve(run: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, validation loss over all bands) of a run."""
    return [(step, sum(bands) / len(bands)) for step, bands in run["curve"]]


def loss_changes(found: Runs, variant: str) -> list[Estimate]:
    """Percent by which the last validation loss differs from the reference: over all bands, then band by band."""
    pairs = shared_pairs(found, variant)
    before = [found[REFERENCE][pair]["curve"][-1][1] for pair in pairs]
    after = [found[variant][pair]["curve"][-1][1] for pair in pairs]

    def change(pick: Callable[[list[float]], float]) -> Estimate:
        return paired_interval([100 * (pick(b) / pick(a) - 1) for a, b in zip(before, after, strict=True)])

    return [change(sum), *(change(lambda bands, band=band: bands[band]) for band in range(len(before[0])))]


def relative_steps(found: Runs, variant: str) -> tuple[list[float], int]:
    """Steps to reach the reference's best loss over the reference's own, where reached; and how many never did."""
    shares, missed = [], 0
    for pair in shared_pairs(found, variant):
        reference = mean_curve(found[REFERENCE][pair])
        best = min(loss for _, loss in reference)
        own, needed = steps_to_reach(reference, best), steps_to_reach(mean_curve(found[variant][pair]), best)
        assert own is not None, "a curve reaches its own best"
        if needed is None:
            missed += 1
        else:
            shares.append(needed / own)
    return shares, missed


def _compared(found: Runs) -> list[str]:
    return [name for name in found if name != REFERENCE and len(shared_pairs(found, name)) > 1]


def loss_table(rows: Rows) -> list[str]:
    """The last validation loss and the steps to the reference's best, for every variant."""
    found = runs(rows, "loss")
    body = []
    for variant in _compared(found):
        shares, missed = relative_steps(found, variant)
        steps = f"{sum(shares) / len(shares):.2f}" if shares else "–"
        body.append([
            f"`{variant}`", str(len(shared_pairs(found, variant))), _signed(loss_changes(found, variant)[0], 2),
            steps, str(missed),
        ])  # fmt: skip
    return _table(["Variant", "Pairs", "validation loss, %", "steps to its best, of 1", "never reached"], body)


def bands_table(rows: Rows) -> list[str]:
    """The last validation loss band by band; bold where the interval leaves out zero."""
    found = runs(rows, "loss")
    body = []
    for variant in _compared(found):
        cells = []
        for change in loss_changes(found, variant)[1:]:
            text = f"{change.value:+.2f}"
            cells.append(f"**{text}**" if change.low > 0 or change.high < 0 else text)
        body.append([f"`{variant}`", *cells])
    return _table(["Variant", *(f"{200 * band} to {200 * band + 199}" for band in range(5))], body)


def plot_loss(rows: Rows) -> Any:
    """The change of the last validation loss with its interval, a line per variant."""
    found = runs(rows, "loss")
    names = _compared(found)[::-1]
    changes = [loss_changes(found, name)[0] for name in names]
    figure, axis = pyplot.subplots(figsize=(6, 0.5 + 0.26 * len(names)))
    axis.errorbar(
        [change.value for change in changes], range(len(names)),
        xerr=[[c.value - c.low for c in changes], [c.high - c.value for c in changes]], fmt="o", capsize=2,
    )  # fmt: skip
    axis.axvline(0.0, color="grey", linewidth=0.8)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="validation loss against uniform by chance, %")
    return _kept(figure, bool(names))


# --- Copies --------------------------------------------------------------------------------------------------------


def copy_curves(rows: Rows) -> dict[str, dict[Pair, list[tuple[float, float]]]]:
    """(fidelity, copy rate) after every epoch, by variant and (concept, seed)."""

    def rate(epoch: dict[str, Any]) -> float:
        pairs = list(zip(epoch["scores"], epoch["stranger_scores"], strict=True))
        return sum(score > stranger for score, stranger in pairs) / len(pairs)

    return {
        variant: {pair: [(epoch["fidelity"], rate(epoch)) for epoch in run["epochs"]] for pair, run in found.items()}
        for variant, found in runs(rows, "copy").items()
    }


def _epoch_means(curves: dict[Pair, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [
        (sum(fidelity for fidelity, _ in epoch) / len(epoch), sum(rate for _, rate in epoch) / len(epoch))
        for epoch in zip(*curves.values(), strict=True)
    ]


def copies_table(rows: Rows) -> list[str]:
    """Fidelity and copy rate after every epoch, and the copy rate's difference at the end and at equal fidelity."""
    curves = copy_curves(rows)
    body = []
    for variant, found in curves.items():
        pairs = sorted(set(found) & set(curves.get(REFERENCE, {})))
        if not pairs:
            continue
        cells = [f"{fidelity:.0%} / {rate:.0%}" for fidelity, rate in _epoch_means({p: found[p] for p in pairs})]
        end = equal = ""
        if variant != REFERENCE and len(pairs) > 1:
            reference = curves[REFERENCE]
            end = _signed(paired_interval([100 * (found[p][-1][1] - reference[p][-1][1]) for p in pairs]))
            saved = copies_saved([(reference[pair], found[pair]) for pair in pairs])
            equal = _signed(Estimate(*(100 * value for value in saved)))
        body.append([f"`{variant}`", str(len(pairs)), *cells, end, equal])
    epochs = len(body[0]) - 4 if body else 0
    return _table(
        ["Variant", "Pairs", *(f"epoch {epoch}" for epoch in range(1, epochs + 1)), "copies at the end, points",
         "copies at equal fidelity, points"], body,
    )  # fmt: skip


def plot_copies(rows: Rows) -> Any:
    """Copy rate over fidelity, a line per variant, a point per epoch."""
    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    curves = copy_curves(rows)
    for marker, (variant, found) in zip("osD^vP", curves.items(), strict=False):
        if found:
            points = [(0.0, 0.0), *_epoch_means(found)]
            axis.plot([100 * x for x, _ in points], [100 * y for _, y in points], marker=marker, markersize=4,
                      linewidth=1, label=variant)  # fmt: skip
    axis.set(xlabel="accepted as the concept, % of new prompts", ylabel="copies, % of training captions")
    if any(curves.values()):
        axis.legend(frameon=False)
    return _kept(figure, any(curves.values()))


# --- Overhead ------------------------------------------------------------------------------------------------------


def overhead_table(rows: Rows) -> list[str]:
    """What planning a step costs, its noise levels included, of the step's time."""
    body = []
    for variant, found in runs(rows, "loss").items():
        shares = sorted(row["planning_seconds"] / row["step_seconds"] for row in found.values())
        if variant in ("none", "batch", "image"):
            body.append([f"`{variant}`", f"{shares[len(shares) // 2]:.3%}", f"{shares[-1]:.3%}"])
    return _table(["Coverage", "middle run", "worst run"], body)
