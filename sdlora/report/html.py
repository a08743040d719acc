"""What all parts of the page share: its frame, its looks, its few lines of script, tables and figures.

The page asks nothing of anyone: a policy in its head forbids the browser every request.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light; --copying: #a3122b; --watch: #7a4b00; --clean: #1b6e3c; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; } h2 { margin-top: 2.6rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; } .wide + h3 { margin-top: 1.6rem; }
p { max-width: 44rem; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; display: block; } img.crisp { image-rendering: pixelated; }
.quiet { color: #555; font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; max-width: 29rem; } svg { width: 100%; }
figcaption { font-size: .875rem; color: #555; margin-top: .4rem; overflow-wrap: anywhere; }
figcaption img { float: left; width: 4rem; margin: .2rem .7rem .2rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; margin: .3rem 0 1.2rem; }
td, th { padding: .15rem .7rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } caption { text-align: left; font-weight: 600; }
.glance :is(td, th):nth-child(2) { text-align: left; }
@media (max-width: 30rem) { table { font-size: .75rem; } td, th { padding-right: .4rem; } }
pre { background: #f5f5f3; padding: 1rem; overflow-x: auto; font-size: .8125rem; }
summary { cursor: pointer; font-weight: 600; padding: .7rem 0; }

.copying { --tone: var(--copying); --tint: #fdecef; } .watch { --tone: var(--watch); --tint: #fff3d9; }
.clean { --tone: var(--clean); --tint: #e8f5ec; }
.verdict { border-left: .5rem solid var(--tone); background: var(--tint); padding: .9rem 1.1rem; }
.verdict strong { display: block; font-size: 1.5rem; line-height: 1.25; color: var(--tone); }
.verdict p { margin: .35rem 0 0; }
.chip { display: inline-block; padding: 0 .5rem; border-radius: 1rem; font-size: .8125rem; font-weight: 600;
  color: var(--tone); background: var(--tint); white-space: nowrap; }

.grid { display: grid; gap: .4rem; grid-template-columns: 13rem repeat(var(--epochs), minmax(6rem, 9rem));
  min-width: calc(13rem + var(--epochs) * 6.4rem); }
.grid b { font-size: .875rem; } .grid .prompt { grid-row: span var(--seeds); padding-right: .6rem; }
.prompt { font-size: .875rem; line-height: 1.35; overflow-wrap: anywhere; background: #fff; position: sticky; left: 0; }
.tile { position: relative; display: block; } .tile img { width: 100%; }
.tile.copying, .tile.watch { outline: 3px solid var(--tone); outline-offset: -3px; }
.tile .chip { position: absolute; left: 5px; bottom: 5px; font-size: .75rem; }
@media (max-width: 40rem) {
  .grid { grid-template-columns: repeat(var(--epochs), minmax(4.9rem, 7rem));
    min-width: calc(var(--epochs) * 5.3rem - .4rem); }
  .grid > :first-child { display: none; }
  .grid .prompt { grid-column: 1 / -1; grid-row: auto; justify-self: start; max-width: calc(100vw - 2rem);
    margin-top: .7rem; }
}

.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.8rem 1.6rem; }
.pair { --shown: 0%; scroll-margin-top: 1rem; } .pair:target { outline: 3px solid #1d5fd0; outline-offset: .4rem; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; align-items: start; }
.two small { display: block; color: #555; line-height: 1.3; overflow-wrap: anywhere; margin-bottom: .2rem; }
.two img { width: 100%; }
.wipe { position: relative; overflow: hidden; }
.over { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--shown)) 0 0); }
.over img { height: 100%; } .pair:has(:checked) .training img { transform: scaleX(-1); }
.edge { position: absolute; inset: 0 auto 0 calc(var(--shown) - 4px); width: 2px; background: #fff;
  border: solid #222; border-width: 0 1px; }
.tools { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; align-items: center; font-size: .875rem; }
.tools input[type=range] { width: 100%; height: 2.75rem; margin: 0; accent-color: #1d5fd0; }
.pair figcaption { margin: 0; } .pair figcaption b { color: #222; display: block; margin-top: .15rem; }
.mirror { padding: .5rem 0; }
"""

# An image stands in the page once; a slider moves the edge of the image above it; a link opens what is folded.
SCRIPT = """
for (const image of document.querySelectorAll('img[data-same]'))
  image.src = document.getElementById(image.dataset.same).src;
for (const slider of document.querySelectorAll('.pair input[type=range]')) {
  const move = () => slider.closest('.pair').style.setProperty('--shown', slider.value + '%');
  slider.addEventListener('input', move);
  move();
}
const unfold = () => {
  const wanted = location.hash && document.getElementById(location.hash.slice(1));
  const folded = wanted && wanted.closest('details');
  if (folded && !folded.open) { folded.open = true; wanted.scrollIntoView(); }
};
addEventListener('hashchange', unfold);
unfold();
"""


def frame(title: str, parts: Sequence[str]) -> str:
    """A whole HTML file.

    Args:
        title: As plain text.
        parts: HTML, one below the other.
    """
    name = html.escape(title)
    return "\n".join(
        [
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title>",
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>",
            f"<style>{STYLE}</style><h1>{name}</h1>",
            *parts,
            f"<script>{SCRIPT}</script></html>\n",
        ]
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells, which scrolls sideways inside its own box."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    # Focusable, or a keyboard could not scroll it.
    box = f"<div class='wide' tabindex='0' role='region' aria-label='{title}'>"
    return f"{box}<table><caption>{title}</caption><tr>{top}</tr>{body}</table></div>"


def figure(title: str, chart: str, sentence: str, image: str = "") -> str:
    """A chart under its title, with a sentence (as plain text) and perhaps a small image below."""
    caption = f"<figcaption>{image}{html.escape(sentence)}</figcaption>"
    return f"<figure><h3>{html.escape(title)}</h3>{chart}{caption}</figure>"


def epoch_name(epoch: int) -> str:
    """What an epoch is called in a heading: "base" or "epoch 2"."""
    return f"epoch {epoch}" if epoch else "base"
