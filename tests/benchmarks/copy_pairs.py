"""How well copies are told from images that are none, where the truth is known by construction.

Copies in eight families are made of training images, and some by the built-in base (through its VAE, or drawn on
from a noised training image). What is none comes in tiers: fresh renders of the same caption, other images of the
same subject, the base's images of the same prompt, and unrelated ones. An image's score is its highest over a
gallery of 24. No threshold is tested on the subject it was set on.

    python tests/benchmarks/copy_pairs.py --docs docs/measurements                     the built-in world
    python tests/benchmarks/copy_pairs.py --photos FOLDER... --docs docs/measurements  photographs
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from copy_sets import CAPTION, FAMILIES, RECOMPOSED, SAME, UNRELATED, Group, photo_groups, world_groups
from diffusers import StableDiffusionImg2ImgPipeline
from estimates import Estimate, clopper_pearson
from generate import GUIDANCE, draw, load_pipeline
from PIL import Image
from setting import silence
from timesteps_report import between
from torch import Tensor

from sdlora.common.bundled import pocket_folder
from sdlora.common.seeds import derive
from sdlora.copycheck.similarity import hp_ms, phash, registered_correlation
from sdlora.copycheck.statistics import fisher_z

STEPS = 10
STRENGTHS = tuple(tenth / 10 for tenth in range(1, 10))
BASE, VAE = "same prompt, base", "through the VAE"
TIERS = (CAPTION, SAME, BASE, UNRELATED)
NUM_HARD = 6  # so many times as many of the tiers that set thresholds, which at 1 % need many
HARD = (CAPTION, SAME)
BARS = {"exact": 0.95, "flip": 0.95, "crop 80": 0.95, "crop 60": 0.95, "jitter": 0.95, "combined": 0.95, "warp": 0.8}
FALSE_ALARMS = 0.01

Scores = dict[str, dict[str, Tensor]]
"""Kind of image to subject to (n, S): every score, each the highest over the gallery."""


# --- Images and scores -------------------------------------------------------------------------------------------


def score(groups: list[Group], num: int, base: Path | None, kept: Path | None = None) -> Scores:
    """Scores of everything, about `num` images of a kind, shared evenly between the groups.

    Args:
        kept: A file that gets the scores, group by group; those that are in it are not made again.
    """
    each = math.ceil(num / len(groups))
    pipeline = load_pipeline(base) if base else None
    done: list[dict[str, Tensor]] = torch.load(kept) if kept and kept.exists() else []
    for place, group in list(enumerate(groups))[len(done) :]:
        made = {
            kind: _compare(images, group.gallery).amax(dim=1).double()
            for kind, images in _images(group, place, each, pipeline)
            if images
        }
        done.append(made)
        if kept:
            torch.save(done, kept)
    found: dict[str, dict[str, list[Tensor]]] = {}
    for group, made in zip(groups, done, strict=True):
        for kind, best in made.items():
            found.setdefault(kind, {}).setdefault(group.subject, []).append(best)
    return {kind: {subject: torch.cat(parts) for subject, parts in of.items()} for kind, of in found.items()}


def _images(group: Group, place: int, each: int, pipeline: Any) -> Iterator[tuple[str, list[Image.Image]]]:
    """Every kind with its images."""
    for family in (*FAMILIES, RECOMPOSED):
        if family != RECOMPOSED or group.recomposed is not None:
            yield family, [group.copy(family, number) for number in range(each)]
    for tier, make in group.others.items():
        yield tier, make(each * (NUM_HARD if tier in HARD else 1))
    if pipeline is not None and group.captions:
        prompts = [group.captions[number % group.own] for number in range(each)]
        yield BASE, draw(pipeline, prompts, guidance=GUIDANCE, steps=STEPS, seed=1_000_000 * (place + 1))
        yield VAE, _through_vae(pipeline, group, each)
        for strength in STRENGTHS:
            yield _drawn_on(strength), _img2img(pipeline, group, strength, math.ceil(each / 3), place)


def _compare(images: list[Image.Image], gallery: list[Image.Image]) -> Tensor:
    """(P, G, 3)."""
    return torch.stack([similarity(images, gallery) for similarity in (hp_ms, phash, registered_correlation)], dim=-1)


def _drawn_on(strength: float) -> str:
    return f"img2img {strength:.1f}"


def _through_vae(pipeline: Any, group: Group, count: int) -> list[Image.Image]:
    images = [group.gallery[number % group.own] for number in range(count)]
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(images)
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    found: list[Image.Image] = pipeline.image_processor.postprocess(decoded)
    return found


def _img2img(pipeline: Any, group: Group, strength: float, count: int, place: int) -> list[Image.Image]:
    """Training images, noised to that share of all steps and drawn on from there by the base."""
    redraw = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    redraw.set_progress_bar_config(disable=True)
    numbers = [number % group.own for number in range(count)]
    seeds = [derive(0, "img2img", group.subject, place, _drawn_on(strength), number) for number in range(count)]
    images: list[Image.Image] = redraw(
        [group.captions[number] for number in numbers], image=[group.gallery[number] for number in numbers],
        strength=strength, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    return images


# --- What the scores say -------------------------------------------------------------------------------------------


def _single(column: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, _: scores[:, column]


STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hp_ms": _single(0),
    "phash": _single(1),
    "registered": _single(2),
    # What the verdict measures.
    "hp_ms or phash": lambda scores, null: standardize(scores[:, :2], null[:, :2]).amax(dim=1),
    "hp_ms or registered": lambda scores, null: standardize(
        fisher_z(scores[:, [0, 2]]), fisher_z(null[:, [0, 2]])
    ).amax(dim=1),
}


@dataclass(frozen=True)
class Finding:
    """What one statistic makes of one kind of image.

    Attributes:
        auc: How often it ranks such an image above one of the null, ties by half.
        at: By rate of false alarms, 1 % and 5 %, the share above the threshold for it.
    """

    kind: str
    statistic: str
    num: int
    auc: float
    at: dict[float, Estimate]


def standardize(scores: Tensor, null: Tensor) -> Tensor:
    """Distance of scores from the null's median, in units of the distance from there to its 95th percentile.

    A copy has to exceed the upper tail; a hash has few values, so its interquartile range may be zero.
    """
    ordered = null.double().sort(dim=-2).values
    median, high = (ordered[[int(share * (len(ordered) - 1))]] for share in (0.5, 0.95))
    return (scores.double() - median) / (high - median).clamp(min=1e-9)


def find(scores: Scores, kind: str, statistic: str, null: str) -> Finding:
    """Subject by subject, against the null of all other subjects."""
    above, ranks = {0.01: 0, 0.05: 0}, []
    num = 0
    for subject, own in scores[kind].items():
        others = torch.cat([found for name, found in scores[null].items() if name != subject])
        values, chance = (STATISTICS[statistic](of, others) for of in (own, others))
        num += len(own)
        for rate in above:
            threshold = chance.sort(descending=True).values[most_above(len(chance), rate)]
            above[rate] += int((values > threshold).sum())
        beaten, tied = values[:, None] > chance, values[:, None] == chance
        ranks.append((beaten + tied / 2).mean(dim=1))
    return Finding(
        kind, statistic, num, float(torch.cat(ranks).mean()),
        {rate: clopper_pearson(count, num) for rate, count in above.items()},
    )  # fmt: skip


@functools.cache
def most_above(num: int, rate: float) -> int:
    """How many of so many images of a null may lie above a threshold, so that the rate holds for new subjects too.

    The most of which the exact 95 % interval ends at the rate or below. Without that margin half of all thresholds
    would let more than the rate pass. At 1 %, fewer than 368 images allow none, and even that does not suffice.
    """
    return max(0, bisect.bisect_right(range(num), rate, key=lambda count: clopper_pearson(count, num).high) - 1)


def findings(scores: Scores) -> list[Finding]:
    """Every kind by every statistic; the thresholds are those of other images of the same subject."""
    return [find(scores, kind, statistic, SAME) for kind in scores for statistic in STATISTICS]


def by_folder(same: dict[str, Tensor]) -> Scores:
    """Other photographs of the same subject once more, those of each folder by themselves."""
    folders = dict.fromkeys(subject.partition("/")[0] for subject in same)
    return {
        f"{SAME}, {folder}": {name: found for name, found in same.items() if name.startswith(f"{folder}/")}
        for folder in folders
    }


# --- The page ------------------------------------------------------------------------------------------------------


def tables(found: list[Finding]) -> list[str]:
    """Copies by family, images drawn on by the base, and false alarms by tier, with a verdict on every bar."""
    by = {(one.kind, one.statistic): one for one in found}
    kinds = list(dict.fromkeys(one.kind for one in found))
    head = [f"{name}: {figure}" for name in STATISTICS for figure in ("AUC", "at 1 %", "at 5 %")]

    def row(kind: str) -> list[str]:
        cells = [kind, str(by[kind, "hp_ms"].num)]
        for name in STATISTICS:
            one = by[kind, name]
            cells += [f"{one.auc:.3f}", *(_share(one.at[rate]) for rate in (0.01, 0.05))]
        return cells

    lines = ["Copies: found at thresholds of 1 % and 5 % false alarms.", ""]
    lines += _table(["Family", "n", *head], [row(kind) for kind in kinds if not _is_tier(kind)])
    lines += ["", "No copies: false alarms at the same thresholds.", ""]
    lines += _table(["Tier", "n", *head], [row(kind) for kind in kinds if _is_tier(kind)])
    return [*lines, "", *bars(by)]


def _is_tier(kind: str) -> bool:
    return kind.startswith(TIERS)


def bars(by: dict[tuple[str, str], Finding]) -> list[str]:
    """A line that says what each statistic does not meet."""
    lines = []
    for name in STATISTICS:
        missed = [
            f"{kind} {by[kind, name].at[0.01].value:.2f} of {bar:.2f}"
            for kind, bar in BARS.items()
            if by[kind, name].at[0.01].value < bar
        ]
        alarms = by[SAME, name].at[0.01]
        if alarms.value > FALSE_ALARMS:
            missed.append(f"{alarms.value:.1%} false alarms of {FALSE_ALARMS:.0%} (up to {alarms.high:.1%})")
        lines.append(f"- `{name}` " + ("misses " + ", ".join(missed) if missed else "meets every bar") + ".")
    return lines


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, nargs="+", help="folders of photographs, a subfolder per subject")
    parser.add_argument(
        "--mixed", action="store_true", help="photographs in turn in the gallery and out, not in halves"
    )
    parser.add_argument("--name", help="of the tables' place on the page: pairs, photos, mixed or packages")
    parser.add_argument("--num", type=int, default=300, help="images of every kind")
    parser.add_argument("--base", type=Path, default=pocket_folder(), help="draws the base's images of the world")
    parser.add_argument("--scores", type=Path, help="a file that keeps the scores, to go on from after a break")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--docs", type=Path, help="the folder whose copy-check.md gets the tables")
    options = parser.parse_args()
    silence()
    torch.set_num_threads(1)  # sums in another order would be other numbers
    if options.photos:
        groups, num_left_out = photo_groups(options.photos, options.mixed)
        note = f"{len({group.subject for group in groups})} subjects, {num_left_out} near-duplicates left out."
    else:
        groups = world_groups()
        note = f"{len(groups)} subjects."
    scores = score(groups, options.num, options.base if not options.photos else None, options.scores)
    if options.photos and len(options.photos) > 1:
        scores |= by_folder(scores[SAME])
    found = findings(scores)
    lines = [f"{note} {line}" if number == 0 else line for number, line in enumerate(tables(found))]
    print(json.dumps([asdict(one) for one in found]) if options.json else "\n".join(lines))
    if options.docs:
        page = options.docs / "copy-check.md"
        name = options.name or ("photos" if options.photos else "pairs")
        page.write_text(between(page.read_text(encoding="utf-8"), name, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
