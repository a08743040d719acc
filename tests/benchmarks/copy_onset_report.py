"""Tables of docs/measurements/copy-check.md from finished cells of `copy_onset.py`; its prose is written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from concepts import ALL_CONCEPTS
from generate import wilson
from results import read
from timesteps_report import between

from sdlora.copycheck.signals import OUTSIDE, Signal
from sdlora.copycheck.verdict import ALPHA, EpochCheck, Match, judge, recommend

Rows = list[dict[str, Any]]
ONSET_SHARE = 0.05  # copying has begun where the true copy rate is above this, by the lower end of its interval
NEVER = "never"
REGISTERED = "registered_likeness"
TRAINED = {"tenth": "a tenth of the rate", "many": "24 images, as many steps"}
CONTROLS = {
    "own_previews_check": "the over-trained run's previews against validation images of other scenes",
    "heldout_check": "its file against all validation images, drawing their captions",
}


def write(results: Path, page: Path) -> None:
    """Fill the tables of a page."""
    rows = [judged(row) for row in read(results)]
    tables: dict[str, Callable[[Rows], list[str]]] = {
        "oracle": oracle_table, "onset": onset_table, "silence": silence_table, "warped": warped_table,
        "chosen": chosen_table,
    }  # fmt: skip
    text = page.read_text(encoding="utf-8")
    for name, make in tables.items():
        text = between(text, name, "\n".join(make(rows)))
    page.write_text(text, encoding="utf-8")


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """A cell with what the product says of its scores: each check's verdict and, of a run, the recommended epoch."""
    checks = {epoch["epoch"]: _check(epoch["check"]) for epoch in row.get("epochs", ())}
    told = {name: row[name] | _told(_check(row[name])) for name in CONTROLS if name in row}
    if not checks:
        return row | told
    epochs = [epoch | {"check": epoch["check"] | _told(checks[epoch["epoch"]])} for epoch in row["epochs"]]
    losses = {epoch["epoch"]: epoch["heldout_loss"] for epoch in epochs}
    return row | told | {"epochs": epochs, "recommended": recommend(checks, losses, max(losses))[0]}


def _check(kept: dict[str, Any]) -> EpochCheck:
    matches = [
        Match("", kind, 0, "", hp_ms, phash, chance, chance <= ALPHA, "")
        for kind, hp_ms, phash, chance in kept["previews"]
    ]
    return judge(matches, [Signal(name, None, 0.0, "") for name in kept["outside"]])


def _told(check: EpochCheck) -> dict[str, Any]:
    return {"verdict": check.verdict, "significant": sum(match.significant for match in check.previews)}


def _part(rows: Rows, part: str) -> Rows:
    order = list(ALL_CONCEPTS)
    mine = [row for row in rows if row["cell"]["part"] == part]
    return sorted(mine, key=lambda row: (order.index(row["cell"]["concept"]), row["cell"]["seed"]))


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    if not body:
        return ["*Not measured yet.*"]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


def _share(successes: int, count: int) -> str:
    """Such as "98 % (92 to 99)"."""
    low, high = wilson(successes / count, count)
    return f"{successes / count:.0%} ({100 * low:.0f} to {100 * high:.0f})"


# --- The oracle ----------------------------------------------------------------------------------------------------


def oracle_table(rows: Rows) -> list[str]:
    """How often the oracle calls what a copy, over all concepts, and the concept with the fewest and the most."""
    found = _part(rows, "oracle")
    body = []
    for name in found[0]["copies"] if found else ():
        counts = {row["cell"]["concept"]: row["copies"][name] for row in found}
        total, size = (sum(values) for values in zip(*counts.values(), strict=True))
        ordered = sorted(counts, key=lambda concept: counts[concept][0] / counts[concept][1])
        ends = [f"{concept} {counts[concept][0] / counts[concept][1]:.0%}" for concept in (ordered[0], ordered[-1])]
        body.append([name, str(size), _share(total, size), *ends])
    return _table(["Images", "How many", "called copies", "fewest", "most"], body)


# --- The right epoch -----------------------------------------------------------------------------------------------


def true_copies(epoch: dict[str, Any]) -> tuple[int, int]:
    """(copies, images) of an epoch by the oracle, from training captions and from new prompts together."""
    kinds = epoch["copies"].values()
    return sum(copies for copies, _ in kinds), sum(count for _, count in kinds)


def onset(run: dict[str, Any]) -> int | None:
    """The first epoch whose true copy rate is above 5 % beyond doubt, or None."""
    for epoch in run["epochs"]:
        copies, count = true_copies(epoch)
        if wilson(copies / count, count)[0] > ONSET_SHARE:
            return int(epoch["epoch"])
    return None


def detected(run: dict[str, Any]) -> int | None:
    """The first epoch with the verdict "copying", or None."""
    return next((int(epoch["epoch"]) for epoch in run["epochs"] if epoch["check"]["verdict"] == "copying"), None)


def onset_table(rows: Rows) -> list[str]:
    """Of every over-trained run: the true copies, what the check said, and when each began; then a summary."""
    found = _part(rows, "onset")
    body, gaps, misses = [], [], 0
    for run in found:
        true, said = onset(run), detected(run)
        if true is not None and said is not None:
            gaps.append(said - true)
        misses += true is not None and said is None
        cells = []
        for epoch in run["epochs"]:
            copies, count = true_copies(epoch)
            cells.append(f"{copies}/{count}, {epoch['check']['significant']} {epoch['check']['verdict']}")
        name = f"{run['cell']['concept']} {run['cell']['seed']}"
        body.append([name, *cells, str(true or NEVER), str(said or NEVER)])
    epochs = len(found[0]["epochs"]) if found else 0
    lines = _table(["Run", *(f"epoch {n}" for n in range(1, epochs + 1)), "true onset", "detected"], body)
    if len(gaps) > 1:
        low, middle, high = statistics.quantiles(gaps, n=4, method="inclusive")
        lines += ["", f"Detected minus true onset, over {len(gaps)} runs that have both: median {middle:+g}, quartiles "
                  f"{low:+g} and {high:+g}, from {min(gaps):+d} to {max(gaps):+d}. Missed: {misses} of "
                  f"{sum(onset(run) is not None for run in found)} runs."]  # fmt: skip
    return lines


# --- Silence -------------------------------------------------------------------------------------------------------


def silence_table(rows: Rows) -> list[str]:
    """How many runs of each control were called copying at any epoch, or watched, and what is true at the end."""
    body = []
    for part, words in TRAINED.items():
        runs = _part(rows, part)
        if runs:
            verdicts = [[epoch["check"]["verdict"] for epoch in run["epochs"]] for run in runs]
            true = [true_copies(run["epochs"][-1]) for run in runs]
            body.append([words, *_called(verdicts), _share(sum(c for c, _ in true), sum(n for _, n in true))])
    for name, words in CONTROLS.items():
        checks = [[run[name]["verdict"]] for run in _part(rows, "onset") if name in run]
        if checks:
            body.append([words, *_called(checks), ""])
    return _table(["Control", "Runs", "called copying", "at most watch", "true copies at the end"], body)


def _called(verdicts: list[list[str]]) -> list[str]:
    copying = sum("copying" in run for run in verdicts)
    watched = sum("watch" in run and "copying" not in run for run in verdicts)
    return [str(len(verdicts)), str(copying), str(watched)]


# --- The sign of warped copies --------------------------------------------------------------------------------------


def warped_table(rows: Rows) -> list[str]:
    """In how many runs of each part the similarity after registration stands out, by epoch, where it was measured."""
    body = []
    for part, words in {"onset": "four images, over-trained", **TRAINED}.items():
        runs = [run for run in _part(rows, part) if all(REGISTERED in epoch["check"] for epoch in run["epochs"])]
        chances = [[epoch["check"][REGISTERED] for epoch in run["epochs"]] for run in runs]
        if runs:
            cells = [str(sum(chance <= OUTSIDE for chance in column)) for column in zip(*chances, strict=True)]
            body.append([words, str(len(runs)), *cells])
    epochs = len(body[0]) - 2 if body else 0
    return _table(["Runs", "how many", *(f"epoch {n}" for n in range(1, epochs + 1))], body)


# --- The recommended epoch -----------------------------------------------------------------------------------------


def choices(run: dict[str, Any]) -> dict[str, int]:
    """The epoch that each way of choosing takes."""
    losses = {epoch["epoch"]: epoch["train_loss"] for epoch in run["epochs"]}
    return {
        "recommended": run["recommended"],
        "last": max(losses),
        "lowest training loss": min(losses, key=lambda epoch: losses[epoch]),
    }


def chosen_table(rows: Rows) -> list[str]:
    """Fidelity, true copy rate and both at once, of the epoch that each way of choosing takes, over all runs."""
    runs = _part(rows, "onset")
    body = []
    for way in choices(runs[0]) if runs else ():
        taken = [(run, choices(run)[way]) for run in runs]
        epochs = [next(e for e in run["epochs"] if e["epoch"] == number) for run, number in taken]
        accepted = [sum(values) for values in zip(*(epoch["accepted"] for epoch in epochs), strict=True)]
        copies = [sum(values) for values in zip(*(true_copies(epoch) for epoch in epochs), strict=True)]
        mean = statistics.mean(number for _, number in taken)
        body.append([way, str(len(runs)), f"{mean:.1f}", _share(*accepted), _share(*copies), _worth_keeping(epochs)])
    head = ["accepted as the concept, new prompts", "copies, all prompts", "accepted and no copy, previews"]
    return _table(["Epoch", "Runs", "on average", *head], body)


def _worth_keeping(epochs: Rows) -> str:
    """The share of previews that show the concept and are no copies, over the runs whose previews were judged."""
    found = [
        accepted and not copy
        for epoch in epochs
        if "preview_accepted" in epoch
        for accepted, copy in zip(epoch["preview_accepted"], epoch["preview_copies"], strict=True)
    ]
    return _share(sum(found), len(found)) if found else ""
