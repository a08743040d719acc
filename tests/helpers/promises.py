"""What sdlora promises, which test holds it, and what that test last found: makes docs/reliability.md.

    SDLORA_RECORD=1 pytest tests/reliability tests/ui tests/lora --slow && python tests/helpers/promises.py

The first command writes figures to docs/reliability.json, the second one the page.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

Figure = Callable[[str, str], None]
"""Takes a promise's name and what its test found."""


@dataclass(frozen=True)
class Promise:
    """A row of the page.

    Attributes:
        name: What is promised, in a word or two.
        meaning: What is promised, in a sentence.
        test: The test's file under tests/ and its name; None where there is none.
        note: What the test does not show, or why there is none.
    """

    name: str
    meaning: str
    test: str | None
    note: str = ""


_GPU = "Raised by the test; there was no GPU to fill."

PROMISES = [
    Promise(
        "Exact resume",
        "Killed at any point and gone on with, a run ends in the same bytes: LoRA, optimizer, previews, checks.",
        "reliability/test_exact_resume.py::test_a_run_killed_anywhere_ends_in_the_same_bytes",
        "On a CPU; GPUs add up in an order of their own.",
    ),
    Promise(
        "Always a checkpoint",
        "Killed while it saves, a run has a whole checkpoint to go on from.",
        "reliability/test_saving.py::test_there_is_always_a_checkpoint_to_go_on_from",
    ),
    Promise(
        "Atomic files",
        "Of every file there is the old content or the new one; what was half written is cleared away.",
        "reliability/test_saving.py::test_a_full_disk_tears_no_file",
        "metrics.jsonl and log.txt only grow, and are cut back to the checkpoint.",
    ),
    Promise(
        "Full disk",
        "A disk that is too small is told before the start; one that fills ends the run with exit code 6.",
        "reliability/test_saving.py::test_a_disk_that_is_too_small_is_told_beforehand_and_one_that_fills_ends_the_run",
    ),
    Promise(
        "NaN, infinity",
        "NaN stops a run within a step, with exit code 5; it is never saved, and the last good epoch is named.",
        "reliability/test_failures.py::test_no_number_stops_a_run_within_a_step",
        "On a GPU a step's numbers are read after the next step.",
    ),
    Promise(
        "Full memory",
        "When memory is full, a run ends with exit code 4 and names the setting to lower; it can be gone on with.",
        "reliability/test_failures.py::test_full_memory_names_the_setting_to_lower",
        _GPU,
    ),
    Promise(
        "Batches in parts",
        "With train.auto_batch smaller parts of a batch are computed when memory is full, to the same result.",
        "reliability/test_failures.py::test_batches_in_parts_give_the_same_result",
        _GPU,
    ),
    Promise(
        "Stop",
        "Ctrl-C and SIGTERM end a run within a step, or between two images, so that it can be gone on with.",
        "reliability/test_failures.py::test_a_signal_stops_a_run_that_can_go_on",
    ),
    Promise(
        "Two starts at once",
        "In a folder exactly one run runs; on a GPU a second one waits, or is refused with --no-wait.",
        "reliability/test_two_starts.py::test_of_two_starts_in_a_folder_exactly_one_runs",
        "Turns on a GPU are tested with a lock file alone.",
    ),
    Promise(
        "Broken images",
        "What is no image, or too large a one, is refused by name in bounded memory.",
        "reliability/test_picture_files.py::test_broken_pictures_are_refused_by_name_in_bounded_memory",
    ),
    Promise(
        "Odd images",
        "Orientation, transparency, 16 bits, palettes and CMYK are read as people see them, or refused in words.",
        "reliability/test_picture_files.py::test_odd_pictures_are_read_as_people_see_them_or_refused_in_words",
        "Colours are taken as they are stored: a profile other than sRGB is not applied.",
    ),
    Promise(
        "Pickles",
        "Files that could run a program when they are read are not read.",
        "reliability/test_hostile_files.py::test_pickles_are_never_opened",
    ),
    Promise(
        "Hostile LoRA files",
        "safetensors files that lie are refused in words.",
        "reliability/test_hostile_files.py::test_hostile_safetensors_are_refused_in_words",
    ),
    Promise(
        "Fuzzed readers",
        "Captions, settings, LoRA files and archives that a fuzzer makes up are read, or refused in words.",
        "reliability/test_fuzzing.py::test_whatever_is_sent_is_read_or_refused",
    ),
    Promise(
        "Code in a base",
        "Code that comes with a base is not run, and no text is: no eval, no shell, no trust_remote_code.",
        "reliability/test_hostile_files.py::test_code_that_comes_with_a_base_is_not_run",
    ),
    Promise(
        "Injection",
        "Names, prompts and captions are never a path, a flag or a script.",
        "reliability/test_injection.py::test_names_prompts_and_captions_stay_what_they_are",
    ),
    Promise(
        "Secrets",
        "Tokens of the environment are written nowhere.",
        "reliability/test_injection.py::test_secrets_are_written_nowhere",
    ),
    Promise(
        "Upgrade",
        "Checkpoints and LoRA files of every version load, or are refused with that version's name.",
        "reliability/test_upgrade.py::test_files_of_every_version_are_read",
    ),
    Promise(
        "Interoperation",
        "Every file loads in diffusers with a greatest difference of 0, under kohya's names.",
        "lora_files/test_interop.py::test_diffusers_loads_every_cell_without_any_error",
        "At small shapes. Each run proves its own files as well. ComfyUI and A1111 themselves are not run.",
    ),
    Promise(
        "Dead worker",
        "The studio says so within 10 seconds when a run's process has died, and how to go on.",
        "ui/pages/test_studio_in_browser.py::test_a_killed_worker_is_told_and_resumed",
    ),
    Promise(
        "Browser",
        "Closing, reloading or opening the page anew changes nothing; two clicks on Start start one run.",
        "ui/pages/test_studio_in_browser.py::test_one_worker_whatever_the_browser_does",
        "In Chromium.",
    ),
    Promise(
        "Uploads",
        "Archives with paths, links, devices' names or bombs in them are refused whole.",
        "ui/state/test_uploads.py::test_hostile_zips_are_refused_whole",
    ),
    Promise(
        "Files over HTTP",
        "Only images that sdlora encoded itself are served.",
        "ui/server/test_server.py::test_hostile_addresses_give_nothing",
    ),
    Promise(
        "Exposure",
        "No password, no other machine: --host 0.0.0.0 is refused without one, and guesses are few.",
        "ui/server/test_server.py::test_the_password_is_asked_and_guesses_are_few",
    ),
]


def record(name: str, found: str) -> None:
    """Keep what a test found."""
    assert name in {promise.name for promise in PROMISES}, name
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    figures[name] = {"figure": found, "date": datetime.date.today().isoformat()}
    FIGURES.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def page() -> str:
    """The page in Markdown."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    lines = [
        "# What sdlora promises",
        "",
        "Each promise has a test, and each figure is what that test found when it last ran.",
        "",
        "    SDLORA_RECORD=1 pytest tests/reliability tests/ui tests/lora --slow",
        "    python tests/helpers/promises.py",
        "",
        "| Promise | What it means | Found | When | Test |",
        "|---|---|---|---|---|",
    ]
    for promise in PROMISES:
        found = figures.get(promise.name, {"figure": "no figure yet", "date": ""})
        test = f"`tests/{promise.test}`" if promise.test else "none"
        meaning = f"{promise.meaning} {promise.note}".strip()
        lines.append(f"| {promise.name} | {meaning} | {found['figure']} | {found['date']} | {test} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
