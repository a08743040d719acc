"""How right the time left is, as a run and the studio tell it: a real run, judged from a tenth of it on.

python tests/benchmarks/time_left.py [CONFIG] [SECTION.KEY=VALUE ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from sdlora.configfile import load_config
from sdlora.events import CopyChecked, PreviewsDone
from sdlora.progress import Timer
from sdlora.run import start


def main() -> None:
    """Run a configuration and print the greatest error of its estimates."""
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else "quickstart", sys.argv[2:])
    timer, told, previews = Timer(), [], 0.0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for event in start(config, Path(folder) / "run"):
            timer.see(event)
            told.append((time.monotonic() - begin, timer.eta_seconds))
            previews += event.seconds if isinstance(event, (PreviewsDone, CopyChecked)) else 0.0
    end = told[-1][0]
    judged = [(at / end, eta, end - at) for at, eta in told if 0.1 * end <= at <= 0.99 * end and eta is not None]
    print(f"{end:.0f} s, {previews / end:.0%} of them previews and checks; judged {len(judged)} times from 10 % on")
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        at, eta, left = min(judged, key=lambda one: abs(one[0] - share))
        print(f"at {at:.0%}: {eta:.1f} s told, {left:.1f} s left, {eta / left - 1:+.0%}")
    worst = max(judged, key=lambda one: abs(one[1] - one[2]) / one[2])
    print(f"worst, at {worst[0]:.0%}: {worst[1]:.1f} s told, {worst[2]:.1f} s left, {worst[1] / worst[2] - 1:+.0%}")


if __name__ == "__main__":
    main()
