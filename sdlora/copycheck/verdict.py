"""The copy check: which training image each preview is most alike, and whether that is more than chance explains.

A verdict needs two things: previews that hardly anything in the null is as alike as, and more of them than a
test at 2 % gives by chance.
Shapes: P previews, G images of the gallery, K images of the null, S scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from sdlora.common.files import write_json
from sdlora.copycheck.embedders import Arbiter, Arbiters, concept_fidelity
from sdlora.copycheck.null_distribution import Gallery, reduced
from sdlora.copycheck.signals import Signal
from sdlora.copycheck.statistics import binomial_p_value, lower_bound, p_values, standardize
from sdlora.previews.sampler import Kind, PreviewRequest

# With a null of a hundred, one odd image in it may be as alike as a copy without blinding the check.
ALPHA = 0.02
CONFIDENCE = 0.999
SIGNALS_TO_WATCH = 2
FILE = "copycheck.json"
FIDELITY = "concept_fidelity"
Verdict = Literal["clean", "watch", "copying"]
_NONE = Arbiters()


@dataclass(frozen=True)
class Match:
    """A preview and the training image that it is most alike.

    Attributes:
        prompt: What was drawn.
        kind: "training" for a caption of the set, "novel" for any other prompt.
        seed: Of the preview's starting noise.
        nearest: The training image's name.
        hp_ms: Their similarity in detail, over crops and mirrors, in [-1, 1].
        phash: The share of equal bits of their perceptual hashes, in [0, 1].
        p_value: How likely an image that copies nothing is as alike to some training image.
        significant: Whether that is at most 2 %.
        file: The preview, seen from the check's folder.
        sscd: The cosine of SSCD's embeddings, in [-1, 1]; None unless it was asked.
        guidance_norm: How hard the prompt pulled, see `sdlora.previews.guidance_norm`; None without guidance.
    """

    prompt: str
    kind: Kind
    seed: int
    nearest: str
    hp_ms: float
    phash: float
    p_value: float
    significant: bool
    file: str
    sscd: float | None = None
    guidance_norm: float | None = None

    @property
    def similarity(self) -> float:
        """The similarity that a person is told, in [0, 1]; 1 is a copy."""
        return min(1.0, max(0.0, self.hp_ms))


@dataclass(frozen=True)
class EpochCheck:
    """What the check found in the previews of one epoch.

    Attributes:
        verdict: "copying" if more previews are significant than chance explains, with a confidence of 99.9 %; "watch"
            if any is, or if two other signals stand out; else "clean".
        reason: Why, in one sentence.
        share: Of previews that are significant, in [0, 1].
        share_lower_bound: What that share is at least, with a confidence of 99.9 %.
        false_alarm_rate: How likely "copying" is said of so many previews if none is more like the set than the null.
        signals: What else was measured, by name.
        previews: In the order of their files.
    """

    verdict: Verdict
    reason: str
    share: float
    share_lower_bound: float
    false_alarm_rate: float
    signals: dict[str, dict[str, Any]]
    previews: list[Match]

    def most_similar(self) -> Match:
        """The preview that is least likely by chance; the highest similarity among equals."""
        return min(self.previews, key=lambda match: (match.p_value, -match.similarity))

    def write(self, folder: Path) -> None:
        """Keep it beside the previews."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> EpochCheck | None:
        """What was kept in an epoch's folder, or None."""
        file = folder / FILE
        if not file.exists():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        return EpochCheck(**{**values, "previews": [Match(**match) for match in values["previews"]]})


def read_checks(epochs: Path) -> dict[int, EpochCheck]:
    """The checks of all epochs that have one, 0 included, in their order.

    Args:
        epochs: The folder that holds a folder per epoch.
    """
    numbers = sorted(int(folder.name) for folder in epochs.glob("*") if folder.name.isdecimal())
    found = {number: EpochCheck.read(epochs / str(number)) for number in numbers}
    return {number: check for number, check in found.items() if check is not None}


def check_previews(
    request: PreviewRequest,
    folder: Path,
    gallery: Gallery,
    null: Tensor,
    signals: Sequence[Signal] = (),
    arbiters: Arbiters = _NONE,
    guidance_norms: Sequence[float] = (),
) -> EpochCheck:
    """Compare the previews of an epoch with the training images.

    Args:
        request: What was drawn.
        folder: The epoch's folder, with the images in `previews`.
        gallery: The images that may have been copied.
        null: Scores of images that copy nothing, (K, S).
        signals: What else was measured.
        arbiters: Networks that are asked as well.
        guidance_norms: One per preview, or none at all.
    """
    files = [f"previews/{name}" for name in request.file_names()]
    images = []
    for file in files:
        with Image.open(folder / file) as image:
            images.append(reduced(image))
    trained = list(gallery.images.values())
    scores = arbiters.scores(images, trained)  # (P, G, S)
    chances = p_values(scores.amax(dim=1), null).tolist()
    nearest = standardize(scores, null).amax(dim=2).argmax(dim=1).tolist()
    names = list(gallery.images)
    norms: Sequence[float | None] = guidance_norms or [None] * len(files)
    matches = [
        Match(
            prompt, kind, seed, names[index],
            **{name: round(float(own[index, column]), 4) for column, name in enumerate(arbiters.score_names)},
            p_value=chance, significant=chance <= ALPHA, file=file, guidance_norm=norm,
        )
        for (prompt, seed), kind, index, own, chance, file, norm in zip(
            request.wanted(), request.kinds(), nearest, scores, chances, files, norms, strict=True
        )
    ]  # fmt: skip
    if arbiters.dinov2 is not None:
        signals = [*signals, _fidelity(arbiters.dinov2, images, gallery)]
    return judge(matches, signals)


def _fidelity(dinov2: Arbiter, images: Sequence[Image.Image], gallery: Gallery) -> Signal:
    # Validation images where there are any: similarity to those cannot be had by copying.
    references = list((gallery.validation or gallery.images).values())
    value = concept_fidelity(dinov2, images, references)
    which = "held-out" if gallery.validation else "training"
    meaning = f"DINOv2 finds previews and {which} images {value:.2f} alike in what they show, of 1."
    return Signal(FIDELITY, value, None, meaning)


def judge(matches: Sequence[Match], signals: Sequence[Signal]) -> EpochCheck:
    """The verdict on an epoch, from what was found in its previews.

    Args:
        matches: One per preview, at least one.
        signals: What else was measured.
    """
    total, found = len(matches), [match for match in matches if match.significant]
    bound = lower_bound(len(found), total, CONFIDENCE)
    outside = [signal for signal in signals if signal.outside]
    verdict: Verdict = "clean"
    if bound > ALPHA:
        verdict = "copying"
    elif found or len(outside) >= SIGNALS_TO_WATCH:
        verdict = "watch"
    return EpochCheck(
        verdict=verdict,
        reason=_reason(verdict, matches, found, bound, outside),
        share=len(found) / total,
        share_lower_bound=bound,
        false_alarm_rate=false_alarm_rate(total),
        signals={signal.name: signal.to_json() for signal in signals},
        previews=list(matches),
    )


def false_alarm_rate(num_previews: int) -> float:
    """How likely so many previews are called copying if each stands out by chance in 2 of 100 cases."""
    fewest = next(
        (k for k in range(1, num_previews + 1) if lower_bound(k, num_previews, CONFIDENCE) > ALPHA), num_previews + 1
    )
    return binomial_p_value(fewest, num_previews, ALPHA)


def _reason(
    verdict: Verdict, matches: Sequence[Match], found: Sequence[Match], bound: float, outside: Sequence[Signal]
) -> str:
    total = len(matches)
    if found:
        best = max(found, key=lambda match: match.similarity)
        told = (
            f"{len(found)} of {total} previews {'is' if len(found) == 1 else 'are'} more like a training image than "
            f"{1 - ALPHA:.0%} of what copies nothing; the most similar is {best.nearest} "
            f"(similarity {best.similarity:.2f})"
        )
        novel = sum(match.kind == "novel" for match in found)
        if novel:
            told += f", and {novel} of them came from new prompts"
        if verdict == "copying":
            return f"{told}; with {CONFIDENCE:.1%} confidence at least {bound:.0%} are copies."
        return f"{told}; among {total} previews chance does that too often to call it copying."
    if verdict == "watch":
        names = ", ".join(signal.name.replace("_", " ") for signal in outside)
        return f"No preview is a copy, but {len(outside)} early signs stand out: {names}."
    return f"None of {total} previews is more like a training image than images that copy nothing."


def recommend(checks: dict[int, EpochCheck], losses: dict[int, float], last: int) -> tuple[int, str]:
    """The epoch to keep, and why: of those that do not copy, the one that has learned the concept best.

    Args:
        checks: The check of every epoch from 1 on; empty if nothing was checked.
        losses: Validation losses by epoch, which count where DINOv2 was not asked; empty if none were measured.
        last: The last epoch.

    Returns:
        The epoch and a sentence or two.
    """
    fidelities = {
        epoch: float(check.signals[FIDELITY]["value"]) for epoch, check in checks.items() if FIDELITY in check.signals
    }
    epochs = range(1, last + 1)
    copying = [epoch for epoch in epochs if epoch in checks and checks[epoch].verdict == "copying"]
    allowed = [epoch for epoch in epochs if epoch not in copying]
    if not allowed:
        best = min(epochs, key=lambda epoch: (checks[epoch].share, epoch))
        return best, (
            f"Every epoch copies training images. Epoch {best} is kept, where the fewest previews are copies. Train "
            "with more images, or lower data.repeats, lora.rank or train.learning_rate, and leave loss.weighting at "
            "'constant': the others copy sooner (docs/timesteps.md)."
        )
    left_out = f" Left out because {'it copies' if len(copying) == 1 else 'they copy'}: epoch "
    told = f"{left_out}{', '.join(map(str, copying))}." if copying else ""
    if set(allowed) <= fidelities.keys():
        best = max(allowed, key=lambda epoch: fidelities[epoch])
        fit = f"its similarity to the concept by DINOv2, {fidelities[best]:.3f}, is the highest"
    elif set(allowed) <= losses.keys():
        best = min(allowed, key=lambda epoch: losses[epoch])
        fit = f"its validation loss, {losses[best]:.5f}, is the lowest"
    else:
        best = allowed[-1]
        return best, f"Epoch {best} is kept, the last one: without validation images nothing can be compared.{told}"
    return best, f"Epoch {best} is kept: {fit} of {len(allowed)} epochs.{told}"
