"""The verdict on an epoch: which training image each preview is nearest to, and whether too many are copies.

Called by `checker` at the end of an epoch. "copying" takes previews that are significant at 2 % on the set's scale, and
more of them than such a test alone gives.
Shapes: P previews, G images of the gallery, M measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sdlora.common.files import write_json
from sdlora.copycheck.embedders import Embedder, Embedders, concept_fidelity
from sdlora.copycheck.parts import Part
from sdlora.copycheck.scale import ALPHA, NEW_SHARE, OWN_SHARE, Gallery, Scale, measures, reduced
from sdlora.copycheck.signals import PREVIEW_CHANGE, Signal
from sdlora.copycheck.sources import CopiedImage
from sdlora.copycheck.statistics import binomial_p_value, lower_bound, normal_tail, upper_bound
from sdlora.errors import OutputError
from sdlora.previews.sampler import Kind, PreviewRequest

CONFIDENCE = 0.999
FULL = 24
"""How many previews are drawn before an epoch with a significant one is left undecided."""
SIGNALS_TO_WATCH = 2
HARDLY_CHANGED = 0.8
"""The mean similarity of previews to the base model's from which nothing seems learned: see `not_learned`."""
MANY = 2  # significant previews, from which an epoch is not kept where nothing else tells
FILE = "copycheck.json"
FIDELITY = "concept_fidelity"
Verdict = Literal["clean", "watch", "copying"]


@dataclass(frozen=True)
class Match:
    """A preview and the training image that it is most similar to.

    Attributes:
        kind: "training" for a caption of the set, "novel" for any other prompt.
        seed: Of the preview's starting noise.
        nearest: The training image's name.
        hp_ms: Their similarity in detail, over crops and mirror images, in [-1, 1].
        phash: The share of equal bits of their perceptual hashes, in [0, 1].
        p_value: Against fresh images of the same subject, in [0, 1].
        significant: Whether the p-value is at most 2 %.
        file: The preview, relative to the epoch's folder.
        sscd: The cosine of SSCD's embeddings, in [-1, 1]; None unless `copycheck.sscd` is on.
        features: The agreement of the base model's features, in [-1, 1]; None without a UNet.
        guidance_norm: See `sdlora.previews.sampler.SamplerWatch`; None without guidance.
        part: A part of a training image that it shows, or None; looked for where `copycheck.parts` is on.
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
    features: float | None = None
    guidance_norm: float | None = None
    part: Part | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Match:
        """A match from its entry in `copycheck.json`."""
        part = values.get("part")
        return Match(**{**values, "part": None if part is None else Part(**part)})

    @property
    def similarity(self) -> float:
        """The similarity shown to people, in [0, 1]; 1 is a copy."""
        return min(1.0, max(0.0, self.hp_ms))


@dataclass(frozen=True)
class EpochCheck:
    """What the check found in the previews of one epoch.

    Attributes:
        verdict: "copying" if the lower bound of the share exceeds 2 %; "watch" if more previews are significant than
            one of 24, or at least two other signals; else "clean".
        reason: One sentence.
        share: The share of previews that are significant, in [0, 1].
        share_lower_bound: Its lower confidence bound at 99.9 %.
        false_alarm_rate: The probability of "copying" for this many previews if each is significant with probability
            2 %, by itself.
        signals: The other signals, by name.
        previews: In the order of their files.
        copied_images: The training images that previews match, the one with the most matches first.
        advice: What to do about these images, a sentence or two; may be empty.
    """

    verdict: Verdict
    reason: str
    share: float
    share_lower_bound: float
    false_alarm_rate: float
    signals: dict[str, dict[str, Any]]
    previews: list[Match]
    copied_images: list[CopiedImage] = field(default_factory=list)
    advice: str = ""

    @property
    def num_matches(self) -> int:
        """How many previews are significant."""
        return sum(match.significant for match in self.previews)

    @property
    def most_copies(self) -> float:
        """See the function of this name."""
        return most_copies(len(self.previews), self.num_matches)

    def most_similar(self) -> Match:
        """The preview with the lowest p-value; among equal ones, the highest similarity."""
        return min(self.previews, key=lambda match: (match.p_value, -match.similarity))

    def write(self, folder: Path) -> None:
        """Write it to `copycheck.json` in an epoch's folder."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> EpochCheck | None:
        """The check written in an epoch's folder, or None.

        Raises:
            OutputError: The file is damaged.
        """
        file = folder / FILE
        if not file.exists():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            lists = {
                "previews": [Match.from_json(match) for match in values["previews"]],
                "copied_images": [CopiedImage(**image) for image in values.get("copied_images", [])],
            }
            return EpochCheck(**{**values, **lists})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(
                f"{file} is damaged ({type(error).__name__}: {error}). Delete it; the check of that epoch is lost."
            ) from error


def read_checks(epochs: Path) -> dict[int, EpochCheck]:
    """The checks of all epochs that have one, 0 included, in their order; each epoch has a folder in `epochs`."""
    numbers = sorted(int(folder.name) for folder in epochs.glob("*") if folder.name.isdecimal())
    return {number: check for number in numbers if (check := EpochCheck.read(epochs / str(number))) is not None}


def match_previews(
    request: PreviewRequest,
    folder: Path,
    gallery: Gallery,
    scale: Scale,
    embedders: Embedders,
    guidance_norms: Sequence[float] = (),
) -> tuple[list[Match], Tensor]:
    """Compare previews with the training images.

    Args:
        folder: The epoch's, with the images in `previews`.
        guidance_norms: One per preview, or none at all.

    Returns:
        A match per preview, in the order of the files, and the highest measures of each, (P, M).
    """
    files = [f"previews/{name}" for name in request.file_names()]
    images = [reduced(Image.open(folder / file)) for file in files]
    scores = embedders.scores(images, list(gallery.images.values()))  # (P, G, S)
    found = measures(scores, embedders.score_names)
    kinds = request.kinds()
    share = torch.tensor([OWN_SHARE if kind == "training" else NEW_SHARE for kind in kinds])
    highest, nearest = scale.z_scores(found, share).max(dim=1)
    p = (found.shape[-1] * normal_tail(highest)).clamp(max=1.0).tolist()
    names = list(gallery.images)
    norms: Sequence[float | None] = guidance_norms or [None] * len(files)
    matches = [
        Match(
            prompt, kind, seed, names[index],
            **_named(own[index], embedders.score_names),
            p_value=p_value, significant=p_value <= ALPHA, file=file, guidance_norm=norm,
        )
        for (prompt, seed), kind, index, own, p_value, file, norm in zip(
            request.wanted(), kinds, nearest.tolist(), scores, p, files, norms, strict=True
        )
    ]  # fmt: skip
    return matches, found.amax(dim=1)


def _named(scores: Tensor, names: Sequence[str]) -> dict[str, Any]:
    return {name: round(float(score), 4) for name, score in zip(names, scores, strict=True)}


def fidelity(dinov2: Embedder, request: PreviewRequest, folder: Path, gallery: Gallery) -> Signal:
    """How well the previews in an epoch's folder show the concept."""
    images = [reduced(Image.open(folder / "previews" / name)) for name in request.file_names()]
    # Validation images where there are any: copying does not raise the similarity to those.
    references = list((gallery.validation or gallery.images).values())
    value = concept_fidelity(dinov2, images, references)
    which = "validation" if gallery.validation else "training"
    meaning = f"Mean DINOv2 similarity between previews and {which} images: {value:.2f} (1 is identical)."
    return Signal(FIDELITY, value, None, meaning)


def judge(matches: Sequence[Match], signals: Sequence[Signal]) -> EpochCheck:
    """The verdict on an epoch, from a match per preview, at least one, and the other signals."""
    total, significant = len(matches), [match for match in matches if match.significant]
    bound = lower_bound(len(significant), total, CONFIDENCE)
    outside = [signal for signal in signals if signal.outside]
    verdict: Verdict = "clean"
    if bound > ALPHA:
        verdict = "copying"
    elif len(significant) > most_clean(total) or len(outside) >= SIGNALS_TO_WATCH:
        verdict = "watch"
    return EpochCheck(
        verdict=verdict,
        reason=_reason(verdict, total, significant, bound, outside),
        share=len(significant) / total,
        share_lower_bound=bound,
        false_alarm_rate=false_alarm_rate(total),
        signals={signal.name: signal.to_json() for signal in signals},
        previews=list(matches),
    )


def false_alarm_rate(num_previews: int) -> float:
    """The probability of "copying" if each preview is significant with probability 2 % by itself.

    What was measured on fresh images is in docs/measurements/copy-check.md.
    """
    return binomial_p_value(fewest_copying(num_previews), num_previews, ALPHA)


def fewest_copying(num_previews: int) -> int:
    """How many significant previews make the verdict "copying"; one more than there are if no number does."""
    counts = range(1, num_previews + 1)
    return next((k for k in counts if lower_bound(k, num_previews, CONFIDENCE) > ALPHA), num_previews + 1)


def most_clean(num_previews: int) -> int:
    """How many significant previews the verdict "clean" allows."""
    return int(num_previews >= FULL)


def judge_base(matches: Sequence[Match]) -> EpochCheck:
    """The check of the base model, which cannot have copied: nothing in it is significant."""
    check = judge([replace(match, significant=False) for match in matches], [])
    count = sum(match.significant for match in matches)
    reason = "The base model has not seen the images, so it cannot have copied them."
    if count:
        reason += (
            f" {count} of {len(matches)} previews {'is' if count == 1 else 'are'} as similar to one as a copy; later "
            "epochs are held against that."
        )
    return replace(check, reason=reason)


def most_copies(num_previews: int, num_matches: int = 0) -> float:
    """The largest share of further images that may match, in [0, 1]: its upper confidence bound at 95 %."""
    return upper_bound(num_matches, num_previews, 0.95)


def _reason(verdict: Verdict, total: int, significant: Sequence[Match], bound: float, outside: Sequence[Signal]) -> str:
    if not significant and verdict == "watch":
        names = ", ".join(signal.name.replace("_", " ") for signal in outside)
        return f"No preview matches a training image, but {len(outside)} other signals are unusual: {names}."
    if not significant:
        return (
            f"None of {total} previews matches a training image, which leaves room for up to {most_copies(total):.0%}."
        )
    count, best = len(significant), max(significant, key=lambda match: match.similarity)
    novel = sum(match.kind == "novel" for match in significant)
    told = [
        f"{count} of {total} previews {'is' if count == 1 else 'are'} as close to a training image as a copy; the "
        f"closest is {best.nearest} (similarity {best.similarity:.2f})"
    ]
    if novel:
        told.append(f"{novel} of the {count} came from new prompts, which draw your images again")
    if novel < count:
        told.append(f"{count - novel} came from training captions, which lead back to their images")
    finding = "; ".join(told)
    if verdict == "copying":
        return f"{finding}. At {CONFIDENCE:.1%} confidence that is more than chance: at least {bound:.0%} of previews."
    room = f"It leaves room for up to {most_copies(total, count):.0%}."
    if verdict == "clean":
        return f"{finding}. Of {total} previews, one may be by chance. {room}"
    return f"{finding}. Of {total} previews that is too few to call it copying. {room}"


def recommend(checks: dict[int, EpochCheck], losses: dict[int, float], last: int) -> tuple[int, str]:
    """The epoch to keep, and why: of those that do not copy, the one that has learned the concept best.

    Args:
        checks: The check of every epoch from 1 on; empty if nothing was checked.
        losses: Validation losses by epoch, used without DINOv2; empty if none were measured.
        last: The last epoch.
    """
    best, reason = _recommend(checks, losses, last)
    doubt = not_learned(checks.get(best), losses, best)
    return best, f"{reason} {doubt}" if doubt else reason


def not_learned(check: EpochCheck | None, losses: Mapping[int, float], epoch: int) -> str:
    """Why an epoch seems to have learned nothing, and what to do, or an empty string.

    Args:
        check: The epoch's.
        losses: Validation losses by epoch, that of the base model under 0.
    """
    found = []
    if epoch in losses and 0 in losses and losses[epoch] >= losses[0]:
        found.append("its validation loss is not below the base model's")
    kept = None if check is None or PREVIEW_CHANGE not in check.signals else check.signals[PREVIEW_CHANGE]["value"]
    if kept is not None and kept >= HARDLY_CHANGED:
        found.append(f"its previews are nearly the base model's (similarity {kept:.2f})")
    if not found:
        return ""
    return (
        f"It may have learned nothing: {' and '.join(found)}. Look at the previews; if the concept is missing, train "
        "longer or raise train.learning_rate."
    )


def _recommend(checks: dict[int, EpochCheck], losses: dict[int, float], last: int) -> tuple[int, str]:
    fidelities = {
        epoch: float(check.signals[FIDELITY]["value"]) for epoch, check in checks.items() if FIDELITY in check.signals
    }
    epochs = range(1, last + 1)
    copying = [epoch for epoch in epochs if epoch in checks and checks[epoch].verdict == "copying"]
    # What comes after a copying epoch has seen the images more often still.
    allowed = [epoch for epoch in epochs if not copying or epoch < copying[0]]
    if not allowed:
        best = min(epochs, key=lambda epoch: (checks[epoch].share if epoch in checks else 0.0, epoch))
        return best, (
            f"Every epoch copies training images. Keeping epoch {best}, which has the fewest copies among its "
            "previews. Train with more images, or lower data.repeats, lora.rank or train.learning_rate, and leave "
            "loss.weighting at 'constant': the other weightings copy earlier (docs/timesteps.md)."
        )
    after = " and what follows" if copying and copying[0] < last else ""
    excluded = f" Excluded for copying: epoch {copying[0]}{after}." if copying else ""
    if set(allowed) <= fidelities.keys():
        best = max(allowed, key=lambda epoch: fidelities[epoch])
        criterion = f"the highest DINOv2 similarity to the concept, {fidelities[best]:.3f}"
    elif set(allowed) <= losses.keys():
        best = min(allowed, key=lambda epoch: losses[epoch])
        criterion = f"the lowest validation loss, {losses[best]:.5f}"
    else:
        return _last_before_copies(checks, allowed, excluded)
    return best, f"Keeping epoch {best}: it has {criterion}, of {len(allowed)} epochs.{excluded}"


def _last_before_copies(checks: dict[int, EpochCheck], allowed: Sequence[int], excluded: str) -> tuple[int, str]:
    """The epoch to keep without validation images: the last before several previews match, if not the first of all."""

    def has_copies(epoch: int) -> bool:
        return epoch in checks and sum(match.significant for match in checks[epoch].previews) >= MANY

    end = next((epoch for epoch in allowed if has_copies(epoch)), None)
    if end is None or end == allowed[0]:
        best = allowed[-1] if end is None else end
        why = "the last one" if end is None else "the first one, though previews match a training image already"
    else:
        best, why = end - 1, f"the last before {MANY} previews or more match a training image"
    return best, f"Keeping epoch {best}, {why}; without validation images there is nothing else to go by.{excluded}"
