"""What the copy check costs beside the previews that it looks at: `python tests/benchmarks/copy_cost.py --json`.

Two runs of the quickstart, one short epoch each, with one cache: the first draws the null, the second must not. Seconds
are the clock's, as the product's own events tell them; the share of one in the other is what another machine is like.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from setting import silence

from sdlora.config.toml import load_config
from sdlora.copycheck.null_distribution import PHASE
from sdlora.events import CopyChecked, PreviewsDone, Progress
from sdlora.run.run import start

SHORT = ("train.epochs=1", "data.repeats=1")
MOST = 0.25  # of the previews' seconds


def measure(folder: Path, *changes: str) -> dict[str, Any]:
    """Images of the null that either run draws; seconds that the first epoch's previews and their check take."""
    config = load_config("quickstart", [*SHORT, f"cache.dir={folder / 'cache'}", *changes])
    found: dict[str, list[float]] = {
        "null_pictures": [],
        "null_seconds": [],
        "previews_seconds": [],
        "check_seconds": [],
    }
    for number in (1, 2):
        drawn, seconds, last = 0, 0.0, time.monotonic()
        for event in start(config, folder / str(number)):
            now = time.monotonic()
            if isinstance(event, Progress) and event.phase == PHASE:
                drawn, seconds = event.done, seconds + now - last
            elif isinstance(event, PreviewsDone) and event.epoch == 1:
                found["previews_seconds"].append(event.seconds)
                num_previews = len(event.files)
            elif isinstance(event, CopyChecked) and event.epoch == 1:
                found["check_seconds"].append(event.seconds)
            last = now
        found["null_pictures"].append(drawn)
        found["null_seconds"].append(seconds)
    share = min(a / b for a, b in zip(found["check_seconds"], found["previews_seconds"], strict=True))
    return {"previews": num_previews, **found, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="SECTION.KEY=VALUE", help="of the quickstart's configuration")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    silence()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), *arguments.changes)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"The check of {found['previews']} previews takes {found['share']:.0%} of what drawing them takes "
              f"(at most {MOST:.0%}); the null's images: {found['null_pictures']}.")  # fmt: skip


if __name__ == "__main__":
    main()
