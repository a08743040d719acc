"""The contact sheet of all previews: one row per prompt and seed, one column per epoch.

Written by `run` after the last epoch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdlora.common.files import atomic_path

_PAPER, _TEXT, _FAINT = (250, 250, 248), (30, 30, 34), (120, 120, 126)
_TILE_PX, _GAP_PX, _LABEL_PX, _HEADER_PX = 128, 6, 200, 34


def contact_sheet(labels: Sequence[str], columns: Sequence[tuple[str, Sequence[Path]]], target: Path) -> None:
    """Write one image with all previews.

    Args:
        labels: One per row.
        columns: A heading and the files of its rows, from top to bottom.
        target: The PNG to write.
    """
    width = _LABEL_PX + len(columns) * (_TILE_PX + _GAP_PX) + _GAP_PX
    height = _HEADER_PX + len(labels) * (_TILE_PX + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    heading, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for row, label in enumerate(labels):
        y = _HEADER_PX + row * (_TILE_PX + _GAP_PX)
        draw.multiline_text((_GAP_PX * 2, y + 8), textwrap.fill(label, 26), fill=_FAINT, font=small, spacing=4)
    for column, (title, files) in enumerate(columns):
        x = _LABEL_PX + column * (_TILE_PX + _GAP_PX)
        draw.text((x + 2, 9), title, fill=_TEXT, font=heading)
        for row, file in enumerate(files):
            with Image.open(file) as image:
                # Nearest neighbour keeps small sprites crisp; larger images are reduced smoothly.
                method = Image.Resampling.NEAREST if image.width < _TILE_PX else Image.Resampling.LANCZOS
                tile = image.convert("RGB").resize((_TILE_PX, _TILE_PX), method)
            sheet.paste(tile, (x, _HEADER_PX + row * (_TILE_PX + _GAP_PX)))
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")
