"""Tables and plots of docs/timesteps.md from finished cells; the words around them are written by hand.

Every table stands between two marks in the page, and what is between them is replaced. Cells that are not there yet
are left out, and each table says how many pairs of runs it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from concepts import NUM_TRAINING
from estimates import Estimate, copies_saved, expected_gain, paired_interval, steps_to_reach
from results import read
from variants import REFERENCE, variants

from sdlora.data.order import epoch_batches
from sdlora.diffusion.coverage import cover
from sdlora.diffusion.timesteps import Density

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
    """Fill the tables of docs/timesteps.md and draw its plots."""
    rows = read(results)
    page = docs / "timesteps.md"
    text = page.read_text(encoding="utf-8")
    tables: dict[str, Callable[[Rows], list[str]]] = {
        "noise": noise_table, "levels": levels_table, "loss": loss_table, "bands": bands_table, "copies": copies_table,
        "overhead": overhead_table,
    }  # fmt: skip
    for name, make in tables.items():
        text = between(text, name, "\n".join(make(rows)))
    page.write_text(text, encoding="utf-8")
    for name, plot in (("noise", plot_noise), ("loss", plot_loss), ("copies", plot_copies)):
        figure = plot(rows)
        if figure is not None:
            figure.savefig(docs / f"timesteps_{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            pyplot.close(figure)


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


def noise_gains(rows: Rows, kind: str) -> dict[tuple[int, str], Estimate]:
    """How many times less noise than without coverage, by batch size and coverage: geometric mean over concepts."""
    values = {
        (row["cell"]["batch_size"], row["cell"]["coverage"], row["cell"]["concept"]): row[kind][0]
        for row in rows
        if row["cell"]["part"] == "noise"
    }
    gains: dict[tuple[int, str], list[float]] = {}
    for (size, coverage, concept), value in values.items():
        reference = values.get((size, REFERENCE, concept))
        if coverage != REFERENCE and reference is not None:
            gains.setdefault((size, coverage), []).append(math.log(reference / value))
    return {
        key: Estimate(*(math.exp(value) for value in paired_interval(logs)))
        for key, logs in sorted(gains.items())
        if len(logs) > 1
    }


def noise_table(rows: Rows) -> list[str]:
    """Noise ratios without coverage, and how many times less there is with it."""
    gains = {kind: noise_gains(rows, kind) for kind in ("batch", "window")}
    body = []
    for size in sorted({key[0] for key in gains["batch"]}):
        plain = [
            row["batch"][0]
            for row in rows
            if row["cell"]["part"] == "noise"
            and (row["cell"]["batch_size"], row["cell"]["coverage"]) == (size, REFERENCE)
        ]
        line = [str(size), f"{min(plain):.1f} to {max(plain):.1f}"]
        for coverage in ("batch", "image"):
            for kind in ("batch", "window"):
                gain = gains[kind].get((size, coverage))
                line.append("" if gain is None else f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})")
        body.append(line)
    return _table(
        ["Batch", "none, over concepts", "batch: of a step", "batch: of 8 steps", "image: of a step",
         "image: of 8 steps"], body,
    )  # fmt: skip


def meetings(coverage: str, batch_size: int, num_bins: int, num_seeds: int = 20) -> torch.Tensor:
    """How often two members of a step are in each pair of bins, from plans of the sets' size, (K, K)."""
    counts = torch.zeros(num_bins, num_bins, dtype=torch.float64)
    density = Density("uniform")
    for seed in range(num_seeds):
        batches = [b for epoch in range(1, 5) for b in epoch_batches([0] * NUM_TRAINING, 6, batch_size, epoch, seed)]
        for drawn in cover(coverage, [[(str(v.example), v.visit) for v in batch] for batch in batches], seed):
            bins = torch.tensor([density.timestep(draw) * num_bins // 1000 for draw in drawn])
            present = torch.nn.functional.one_hot(bins, num_bins).double().sum(dim=0)
            counts += torch.outer(present, present) - present.diag()
    return counts / counts.sum()


def levels_table(rows: Rows) -> list[str]:
    """How many times less noise the plans' own meetings of timesteps make, by batch size and coverage."""
    found = [row for row in rows if row["cell"]["part"] == "levels"]
    body = []
    for size in (2, 4, 8) if len(found) > 1 else ():
        line = [str(size)]
        for coverage in ("batch", "image"):
            gains = [
                math.log(
                    expected_gain(
                        torch.tensor(row["between"], dtype=torch.float64),
                        torch.tensor(row["squared_lengths"], dtype=torch.float64),
                        meetings(coverage, size, len(row["between"])),
                        size,
                    )
                )
                for row in found
            ]
            gain = Estimate(*(math.exp(value) for value in paired_interval(gains)))
            line.append(f"{gain.value:.3f} ({gain.low:.3f} to {gain.high:.3f})")
        body.append(line)
    return _table(["Batch", "batch", "image"], body)


def plot_noise(rows: Rows) -> Any:
    """Times less noise over 1, by batch size, for a step and for eight together."""
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.6), sharey=True)
    drawn = False
    for axis, kind, title in zip(axes, ("batch", "window"), ("one step", "mean of eight steps"), strict=True):
        gains = noise_gains(rows, kind)
        for place, coverage in enumerate(("batch", "image")):
            sizes = [size for size, name in gains if name == coverage]
            found = [gains[size, coverage] for size in sizes]
            drawn = drawn or bool(found)
            axis.errorbar(
                [math.log2(size) + 0.12 * (place - 0.5) for size in sizes], [gain.value for gain in found],
                [[gain.value - gain.low for gain in found], [gain.high - gain.value for gain in found]],
                fmt="os"[place], capsize=2, label=f"coverage {coverage}",
            )  # fmt: skip
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="batch size", xticks=range(4), xticklabels=(1, 2, 4, 8))
    axes[0].set_ylabel("times less noise\nthan uniform by chance")
    axes[0].legend(frameon=False)
    return _kept(figure, drawn)


def _kept(figure: Any, drawn: bool) -> Any:
    if drawn:
        return figure
    pyplot.close(figure)
    return None


# --- Held-out loss -------------------------------------------------------------------------------------------------


def mean_curve(run: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, held-out loss over all bands) of a run."""
    return [(step, sum(bands) / len(bands)) for step, bands in run["curve"]]


def loss_changes(found: Runs, variant: str) -> list[Estimate]:
    """Percent by which the last held-out loss differs from the reference: over all bands, then band by band."""
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
    """The last held-out loss and the steps to the reference's best, for every variant."""
    found = runs(rows, "loss")
    body = []
    for variant in _compared(found):
        shares, missed = relative_steps(found, variant)
        steps = f"{sum(shares) / len(shares):.2f}" if shares else "–"
        body.append([
            f"`{variant}`", str(len(shared_pairs(found, variant))), _signed(loss_changes(found, variant)[0], 2),
            steps, str(missed),
        ])  # fmt: skip
    return _table(["Variant", "Pairs", "held-out loss, %", "steps to its best, of 1", "never reached"], body)


def bands_table(rows: Rows) -> list[str]:
    """The last held-out loss band by band; bold where the interval leaves out zero."""
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
    """The change of the last held-out loss with its interval, a line per variant."""
    found = runs(rows, "loss")
    names = _compared(found)[::-1]
    changes = [loss_changes(found, name)[0] for name in names]
    figure, axis = pyplot.subplots(figsize=(6, 0.5 + 0.26 * len(names)))
    axis.errorbar(
        [change.value for change in changes], range(len(names)),
        xerr=[[c.value - c.low for c in changes], [c.high - c.value for c in changes]], fmt="o", capsize=2,
    )  # fmt: skip
    axis.axvline(0.0, color="grey", linewidth=0.8)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="held-out loss against uniform by chance, %")
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
