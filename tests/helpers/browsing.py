"""A real studio in a process of its own, and a real browser before it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CUT_OFF = ("ERR_ABORTED", "Failed to fetch", "AbortError", "Connection errored out")
"""What a browser says of requests that were under way when a page was loaded anew, which is no fault."""
PATIENCE_MS = 180_000  # a machine may be busy with other things; waits end as soon as there is something to see


@dataclass
class Open:
    """A studio that is open.

    Attributes:
        url: Where.
        runs: Its folder.
    """

    url: str
    runs: Path

    def workers(self) -> list[psutil.Process]:
        """The training processes of its runs that live."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if str(self.runs) in " ".join(words) and "train" in words and process.info["status"] != "zombie":
                found.append(process)
        return found


@contextmanager
def open_studio(runs: Path) -> Iterator[Open]:
    """`sdlora ui` on a free port; everything that it started is ended in the end."""
    command = [sys.executable, "-m", "sdlora", "ui", "--no-browser", "--port", "0", "--runs", str(runs)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    log = runs.parent / f"{runs.name}-ui.log"
    with (
        log.open("w") as handle,
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=handle, text=True, env=environment) as process,
    ):
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://\S+", said)) and (line := process.stderr.readline()):
            said += line
        try:
            assert found, said
            yield Open(found[0], runs)
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()
            process.wait(30)
            for worker in Open("", runs).workers():
                worker.kill()


@contextmanager
def browser_page(
    browser: Any, studio: Open, *, width: int = 1366, theme: str = "light", patience_ms: int = PATIENCE_MS
) -> Iterator[Any]:
    """A page that is watched: no request leaves the studio, and nothing is complained of."""
    faults: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    context.set_default_timeout(patience_ms)
    page = context.new_page()
    page.on("request", lambda r: None if r.url.startswith((studio.url, "data:", "blob:")) else faults.append(r.url))
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    enter(page, studio)
    yield page
    context.close()
    faults[:] = [fault for fault in faults if not any(mark in fault for mark in CUT_OFF)]
    assert not faults, f"the page asked for something elsewhere, or complained: {faults}"


def enter(page: Any, studio: Open, name: str = "images") -> None:
    """Open the studio on one of its pages, and wait until all are filled."""
    page.goto("about:blank")  # another address of the same page would not load it
    page.goto(f"{studio.url}#{name}")
    page.locator("#strip .strip").wait_for()
    page.locator("body:not([inert])").wait_for()


def tab(page: Any, name: str) -> None:
    """Go to a page of the studio."""
    page.get_by_role("tab", name=name, exact=True).click()
