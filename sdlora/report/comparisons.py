"""Previews as images: a grid of prompts by epochs, and each preview beside its nearest training image."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageChops, ImageOps, ImageStat

from sdlora.copycheck.verdict import Match
from sdlora.report.copy_section import Checks, in_one_of
from sdlora.report.html import epoch_name
from sdlora.report.images import Album

_ALARMS = ("copying", "watch", "clean")
_LAYOUT_PX = 16  # enough to tell left from right
_HEADINGS = {
    "training": "Drawn from training captions: some similarity is expected",
    "novel": "Drawn from new prompts: a copy here is the grave case",
}


class Comparisons:
    """The images of all epochs that were checked.

    Args:
        checks: By epoch, at least one.
        epochs: The folder that holds one folder for each epoch.
        gallery: The training images by name, as they are trained.
        album: Where images are embedded.
    """

    def __init__(self, checks: Checks, epochs: Path, gallery: Mapping[str, Image.Image], album: Album) -> None:
        self._checks, self._epochs, self._gallery, self._album = checks, epochs, gallery, album

    def grid(self) -> str:
        """All previews, a column for each epoch; each leads to its comparison, and those that match are marked."""
        latest = self._checks[max(self._checks)].previews
        parts = []
        for kind, heading in _HEADINGS.items():
            prompts = dict.fromkeys(match.prompt for match in latest if match.kind == kind)
            if prompts:
                rows = "".join(self._rows(kind, prompt) for prompt in prompts)
                names = "".join(f"<b>{epoch_name(epoch)}</b>" for epoch in sorted(self._checks))
                parts.append(
                    f"<h3>{heading}</h3><div class='wide' tabindex='0' role='region' aria-label='{heading}'>"
                    f"<div class='grid' style='--epochs: {len(self._checks)}'><span></span>{names}{rows}</div></div>"
                )
        return "".join(parts)

    def pairs(self, epoch: int) -> str:
        """Every preview of an epoch beside its nearest training image, those that matter most first."""
        previews = self._checks[epoch].previews
        first = sorted(
            range(len(previews)),
            key=lambda i: (_ALARMS.index(_tone(previews[i])), previews[i].p_value, -previews[i].similarity),
        )
        return f"<div class='pairs'>{''.join(self._pair(epoch, index) for index in first)}</div>"

    def _rows(self, kind: str, prompt: str) -> str:
        """The tiles of a prompt: a row for each seed."""
        columns = [
            {match.seed: (index, match) for index, match in enumerate(self._checks[epoch].previews)
             if (match.kind, match.prompt) == (kind, prompt)}
            for epoch in sorted(self._checks)
        ]  # fmt: skip
        seeds = sorted({seed for column in columns for seed in column})
        tiles = [
            self._tile(epoch, *column[seed]) if seed in column else "<span></span>"
            for seed in seeds
            for epoch, column in zip(sorted(self._checks), columns, strict=True)
        ]
        return f"<div class='prompt' style='--seeds: {len(seeds)}'>{html.escape(prompt)}</div>{''.join(tiles)}"

    def _tile(self, epoch: int, index: int, match: Match) -> str:
        tone = _tone(match)
        badge = f"<span class='chip {tone}'>{'✕' if tone == 'copying' else '!'} match</span>"
        shown = self._preview(epoch, match, f"{match.prompt}, {epoch_name(epoch)}, seed {match.seed}")
        return (
            f"<a class='tile {tone if match.significant else ''}' href='#pair-{epoch}-{index}'>{shown}"
            f"{badge if match.significant else ''}</a>"
        )

    def _pair(self, epoch: int, index: int) -> str:
        match = self._checks[epoch].previews[index]
        name = html.escape(match.nearest, quote=True)
        preview = self._preview(epoch, match, f"preview: {match.prompt}")
        laid_over = self._training(match, f"{match.nearest}, laid over the preview")
        beside = self._training(match, f"training image {match.nearest}")
        mirrored = " checked" if match.significant and self._is_mirrored(epoch, match) else ""
        return (
            f"<figure class='pair' id='pair-{epoch}-{index}'><div class='two'>"
            f"<div><small>preview</small><div class='wipe'>{preview}<div class='over training'>{laid_over}</div>"
            f"<div class='edge'></div></div></div>"
            f"<div class='training'><small>{name}</small>{beside}</div></div>"
            f"<div class='tools'><input type='range' min='0' max='100' value='0' "
            f"aria-label='Percent of the preview that {name} is laid over'>"
            f"<label class='mirror'><input type='checkbox'{mirrored}> mirror it</label></div>"
            f"<figcaption>{_alarm(match)} similarity {match.similarity:.2f}, layout {match.phash:.2f}"
            f"<b>{html.escape(match.prompt)}</b>"
            f"{_origin(match)}, seed {match.seed}. Chance gives as much {in_one_of(match.p_value)}."
            "</figcaption></figure>"
        )

    def _is_mirrored(self, epoch: int, match: Match) -> bool:
        preview, training = _read(self._epochs / str(epoch) / match.file), self._gallery[match.nearest]
        return _difference(preview, ImageOps.mirror(training)) < _difference(preview, training)

    def _preview(self, epoch: int, match: Match, alt: str) -> str:
        file = self._epochs / str(epoch) / match.file
        return self._album.show(str(file), lambda: _read(file), alt)

    def _training(self, match: Match, alt: str) -> str:
        return self._album.show(f"training {match.nearest}", lambda: self._gallery[match.nearest], alt)


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def _difference(first: Image.Image, second: Image.Image) -> float:
    small = [image.convert("L").resize((_LAYOUT_PX, _LAYOUT_PX), Image.Resampling.BOX) for image in (first, second)]
    return ImageStat.Stat(ImageChops.difference(*small)).sum[0]


def _tone(match: Match) -> str:
    """The alarm: the grave one is a match that no training caption asked for."""
    if not match.significant:
        return "clean"
    return "watch" if match.kind == "training" else "copying"


def _alarm(match: Match) -> str:
    words = {"clean": "✓ no match", "watch": "! match", "copying": "✕ match on a new prompt"}
    tone = _tone(match)
    return f"<span class='chip {tone}'>{words[tone]}</span>"


def _origin(match: Match) -> str:
    return "A training caption" if match.kind == "training" else "A new prompt"
