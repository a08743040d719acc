"""Previews that nothing is compared with: prompts with settings of their own, and all previews within the epochs.

Shown by the report and the studio below those that are checked, as grids of `templates/parts.html`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from sdlora.previews.index import Shown, read_index
from sdlora.report.copy_section import Grid, Tile
from sdlora.report.html import Album, epoch_name, read_image

_MOST_COLUMNS = 12
Columns = Sequence[tuple[str, Path]]
"""Headings, and the folders that hold the images below them."""


def further_grids(folder: Path, epochs: Iterable[int], album: Album, link: Callable[[Path], str]) -> list[Grid]:
    """What is to be seen beside the previews that are checked; nothing in most runs.

    Args:
        folder: The run's.
        epochs: Those that are shown, 0 included.
        link: Where an image leads to, by its file.
    """

    def tile(file: Path, alt: str) -> Tile | None:
        if not file.is_file():
            return None
        return Tile(link(file), album.show(str(file), partial(read_image, file), alt), "clean")

    def rows(shown: Sequence[Shown], columns: Columns) -> list[tuple[str, list[list[Tile | None]]]]:
        return [
            (label, [
                [tile(place / one.file, f"{label}, {name}, seed {one.seed}") for name, place in columns]
                for one in shown
                if one.label == label
            ])
            for label in dict.fromkeys(one.label for one in shown)
        ]  # fmt: skip

    index = read_index(folder)
    by_epoch = [(epoch_name(epoch), folder / "epochs" / str(epoch) / "previews") for epoch in sorted(epochs)]
    by_step, heading = _steps(folder)
    found = [
        ("Prompts with settings of their own: not compared", [one for one in index if not one.checked], by_epoch),
        (heading, index, by_step),
    ]
    return [
        Grid(title, [(name, "") for name, _ in columns], rows(shown, columns))
        for title, shown, columns in found
        if any((place / one.file).is_file() for one in shown for _, place in columns)
    ]


def _steps(folder: Path) -> tuple[Columns, str]:
    """The steps within epochs at which previews were drawn, at most twelve that are evenly spread, and a heading."""
    steps = sorted(int(path.name) for path in folder.glob("steps/*") if path.name.isdecimal())
    heading, last = "Within the epochs: not compared", len(steps) - 1
    if last >= _MOST_COLUMNS:
        heading += f" ({_MOST_COLUMNS} of {len(steps)}; all are in the run's folder steps)"
        steps = [steps[number * last // (_MOST_COLUMNS - 1)] for number in range(_MOST_COLUMNS)]
    return [(f"step {step}", folder / "steps" / str(step) / "previews") for step in steps], heading
