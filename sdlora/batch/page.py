"""The page of a batch: every job in one table, learning against copying, and all previews side by side.

It links to each run's own page, beside it in the run's folder, and needs nothing else.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.batch.results import Result, comparable, learned
from sdlora.common.files import write_text
from sdlora.common.text import format_seconds
from sdlora.copycheck.verdict import EpochCheck, Match
from sdlora.report.charts import COLORS, Point, scatter_chart
from sdlora.report.copy_section import VERDICT_COLORS, word_chip
from sdlora.report.html import figure, frame
from sdlora.report.images import Album

_STYLE = """<style>
body { max-width: 84rem; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; color: inherit; }
th button::after { content: ' ↕'; color: #999; } th[aria-sort=ascending] button::after { content: ' ↑'; color: #222; }
th[aria-sort=descending] button::after { content: ' ↓'; color: #222; }
.jobs td:nth-child(2), .jobs th:nth-child(2) { text-align: left; }
.jobs tbody tr.front { background: #eef4ff; } .jobs td, .jobs th { padding: .3rem .9rem .3rem 0; vertical-align: top; }
.jobs td:first-child, .jobs th:first-child { padding-left: .5rem; }
.error { white-space: pre-wrap; overflow-wrap: anywhere; }
.grid b { overflow-wrap: anywhere; line-height: 1.25; font-size: .8125rem; align-self: end; }
.grid b small { display: block; font-weight: 400; color: #555; }
</style>"""

_SCRIPT = """<script>
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.closest('th'), body = head.closest('table').tBodies[0];
  const column = [...head.parentNode.children].indexOf(head), up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const of = (row) => row.children[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    if (of(a) === '' || of(b) === '') return (of(a) === '') - (of(b) === '');
    const [x, y] = [Number(of(a)), Number(of(b))];
    const order = Number.isNaN(x) || Number.isNaN(y) ? of(a).localeCompare(of(b)) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
});
</script>"""

Cell = tuple[Any, str]
"""What a cell is sorted by, and its HTML."""


def write_page(file: Path, title: str, results: Sequence[Result], runs: Mapping[str, Path]) -> None:
    """Write a batch's page.

    Args:
        file: What to write.
        title: The batch's.
        results: At least one.
        runs: The run folders of finished jobs, by the job's name.
    """
    parts = [_STYLE, _summary(results), _jobs(results), _errors(results)]
    groups = comparable(results)
    if groups:
        parts.append("<h2>Learning against copying</h2><div class='charts'>")
        parts += [_front(group) for group in groups]
        parts.append("</div>")
    parts += [*_previews(results, runs), _SCRIPT]
    write_text(file, frame(title, parts))


def _summary(results: Sequence[Result]) -> str:
    """How many are done, and of every group of comparable jobs the one to look at first."""
    done = [result for result in results if result.status == "done"]
    missing = [result for result in results if result.status != "done"]
    tone = "clean" if not missing else "copying"
    told = [f"<strong>{len(done)} of {len(results)} jobs are done</strong>"]
    if missing:
        told.append(f"<p>Not done: {html.escape(', '.join(f'{one.job} ({one.status})' for one in missing))}.</p>")
    for group in comparable(results):
        allowed = [one for one in group if one.verdict != "copying"]
        if allowed:
            best = max(allowed, key=lambda one: learned(one, group) or 0.0)
            told.append(f"<p><b>Look first at {_name(best)}</b>: of the jobs that do not copy it has learned most, "
                        f"{_measure(best, group)}.</p>")  # fmt: skip
        else:
            told.append(f"<p>All of {html.escape(', '.join(one.job for one in group))} copy training images.</p>")
    return f"<div class='verdict {tone}'>{''.join(told)}</div>"


def _name(result: Result) -> str:
    return f"{result.number}, {html.escape(result.job)}"


def _measure(result: Result, group: Sequence[Result]) -> str:
    if all(one.fidelity is not None for one in group):
        return f"a similarity to the concept of {result.fidelity:.3f}"
    return f"a validation loss of {result.validation_loss:.4f}"


# --- The table -----------------------------------------------------------------------------------------------------


def _jobs(results: Sequence[Result]) -> str:
    columns = [
        column for column in _columns(results)
        if column[0] in ("", "job", "status") or any(cell(result)[1] for result in results for cell in column[1:])
    ]  # fmt: skip
    head = "".join(f"<th><button>{html.escape(name) or '#'}</button></th>" for name, _ in columns)
    body = ""
    for result in results:
        cells = [cell(result) for _, cell in columns]
        shown = "".join(
            f"<td data-value='{html.escape('' if value is None else str(value), quote=True)}'>{text}</td>"
            for value, text in cells
        )
        body += f"<tr{' class=front' if result.pareto else ''}>{shown}</tr>"
    note = (
        "Choose a heading to sort. Shaded are those on the front: no comparable job both copies less and has learned "
        "more. Matches: previews more like a training image than chance explains. Similarity: of all previews to "
        "their nearest training images, on average; 1 is a copy."
    )
    return (
        f"<h2>Jobs</h2><div class='wide'><table class='jobs'><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        f"</table></div><p class='quiet'>{note}</p>"
    )


def _columns(results: Sequence[Result]) -> list[tuple[str, Any]]:
    """Every column's name and what gives its cell."""

    def number(name: str, form: str) -> Any:
        def cell(result: Result) -> Cell:
            value = getattr(result, name)
            return value, "" if value is None else format(value, form)

        return cell

    def setting(name: str) -> Any:
        def cell(result: Result) -> Cell:
            value = result.settings[name]
            text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
            return (value if isinstance(value, int | float) else text), html.escape(text)

        return cell

    names = list(results[0].settings)
    short = {name: name.rpartition(".")[2] for name in names}
    settings = [
        (short[name].replace("_", " ") if list(short.values()).count(short[name]) == 1 else name, setting(name))
        for name in names
    ]
    order = {"clean": 0, "watch": 1, "copying": 2}
    return [
        ("", lambda one: (one.number, str(one.number))),
        ("job", lambda one: (one.job, _link(one))),
        ("status", lambda one: (one.status, one.status)),
        *settings,
        ("copies?", lambda one: (order.get(one.verdict), word_chip(one.verdict) if one.verdict else "")),
        ("matches", number("matches", ".0%")),
        ("likeness", number("copying", ".3f")),
        ("validation loss", number("validation_loss", ".4f")),
        ("fidelity", number("fidelity", ".3f")),
        ("front", lambda one: (int(not one.pareto), "yes" if one.pareto else "")),
        ("epoch kept", number("epoch", "d")),
        ("took", lambda one: (one.seconds, format_seconds(one.seconds) if one.seconds else "")),
        ("peak memory", lambda one: (one.peak_memory_bytes, _memory(one.peak_memory_bytes))),
    ]


def _link(result: Result) -> str:
    name = html.escape(result.job)
    return (
        f"<a href='{html.escape(result.job, quote=True)}/report.html'>{name}</a>" if result.status == "done" else name
    )


def _memory(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def _errors(results: Sequence[Result]) -> str:
    failed = [result for result in results if result.error]
    if not failed:
        return ""
    told = "".join(
        f"<p class='error'><b>{html.escape(one.job)}</b>: {html.escape(one.error or '')}</p>" for one in failed
    )
    return f"<h2>What went wrong</h2>{told}"


# --- The front -----------------------------------------------------------------------------------------------------


def _front(group: Sequence[Result]) -> str:
    by_fidelity = all(result.fidelity is not None for result in group)
    points = [
        Point(
            str(result.number),
            result.copying or 0.0,
            abs(learned(result, group) or 0.0),
            VERDICT_COLORS.get(result.verdict or "", COLORS[3]),
            result.pareto,
        )
        for result in group
    ]
    y_name, better = ("fidelity (DINOv2)", "upper") if by_fidelity else ("validation loss", "lower")
    chart = scatter_chart(points, x_name="similarity to training images", y_name=y_name)
    names = ", ".join(str(result.number) for result in group if result.pareto)
    sentence = (
        f"The {better} left corner is the best: much learned and little copied. Filled and joined are the jobs that "
        f"none of the others beats in both ({names}); the colour is the verdict on copying. Numbers are those of the "
        "table. Similarity also grows with honest learning, so it is compared among jobs of the same prompts alone."
    )
    return figure(" / ".join(dict.fromkeys(_subject(result) for result in group)), chart, sentence)


def _subject(result: Result) -> str:
    return str(json.loads(result.group)[1])


# --- Previews ------------------------------------------------------------------------------------------------------


def _previews(results: Sequence[Result], runs: Mapping[str, Path]) -> list[str]:
    """A grid for every group of jobs that drew the same prompts with the same seeds; a column for each job."""
    grids: dict[tuple[tuple[str, int], ...], list[tuple[Result, list[Match], Path]]] = {}
    for result in results:
        if result.job not in runs:
            continue
        place = runs[result.job] / "epochs" / str(result.epoch)
        check = EpochCheck.read(place)
        drawn = check.previews if check is not None else _unchecked(place)
        if drawn:
            grids.setdefault(tuple((one.prompt, one.seed) for one in drawn), []).append((result, drawn, place))
    if not grids:
        return []
    album = Album()
    intro = "<p>Of each job's kept epoch, with the same prompts and seeds. What matches a training image is framed.</p>"
    return ["<h2>Previews side by side</h2>", intro, *(_grid(key, columns, album) for key, columns in grids.items())]


def _unchecked(place: Path) -> list[Match]:
    """Previews that nothing was compared with, by the names of their files."""
    files = sorted((place / "previews").glob("prompt*_seed*.png"))
    return [
        Match(
            prompt=f"prompt {int(file.stem[6:].partition('_')[0]) + 1}", kind="novel",
            seed=int(file.stem.rpartition("seed")[2]), nearest="", hp_ms=0.0, phash=0.0, p_value=1.0,
            significant=False, file=f"previews/{file.name}",
        )
        for file in files
    ]  # fmt: skip


def _grid(
    wanted: Sequence[tuple[str, int]], columns: Sequence[tuple[Result, list[Match], Path]], album: Album
) -> str:  # fmt: skip
    heads = "".join(f"<b>{result.number}<small>{_swept(result)}</small></b>" for result, _, _ in columns)
    rows = ""
    prompts = dict.fromkeys(prompt for prompt, _ in wanted)
    for prompt in prompts:
        places = [index for index, (one, _) in enumerate(wanted) if one == prompt]
        rows += f"<div class='prompt' style='--seeds: {len(places)}'>{html.escape(prompt)}</div>"
        for index in places:
            rows += "".join(_tile(result, drawn[index], place, album) for result, drawn, place in columns)
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='Previews'>"
        f"<div class='grid' style='--epochs: {len(columns)}'><span></span>{heads}{rows}</div></div>"
    )


def _swept(result: Result) -> str:
    """What sets a job apart, short enough for the head of a column."""
    told = [
        f"{name.rpartition('.')[2].replace('_', ' ')} {value:g}"
        for name, value in result.settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return html.escape(", ".join(told) or result.job)


def _tile(result: Result, match: Match, place: Path, album: Album) -> str:
    tone = "" if not match.significant else "watch" if match.kind == "training" else "copying"

    def read() -> Image.Image:
        with Image.open(place / match.file) as image:
            image.load()
            return image

    shown = album.show(str(place / match.file), read, f"{match.prompt}, job {result.number}, seed {match.seed}")
    return f"<a class='tile {tone}' href='{html.escape(result.job, quote=True)}/report.html'>{shown}</a>"
