"""sdlora's promises, the test that holds each, and what that test last found; writes docs/reliability.md.

    SDLORA_RECORD=1 pytest tests/reliability tests/ui tests/lora_files --slow && python tests/helpers/promises.py

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
        name: A word or two.
        meaning: The promise in a sentence.
        test: The test's file under tests/ and its name.
        note: What the test does not show.
    """

    name: str
    meaning: str
    test: str
    note: str = ""


_GPU = "The test raises the error; it was not provoked on a GPU."

PROMISES = [
    Promise(
        "Exact resume",
        "A run that is killed at any point and resumed ends in the same bytes: LoRA, optimizer, previews, checks.",
        "reliability/test_exact_resume.py::test_a_run_killed_anywhere_ends_in_the_same_bytes",
        "Tested on a CPU; a GPU may sum in another order.",
    ),
    Promise(
        "Always a checkpoint",
        "A run that is killed while it saves still has a complete checkpoint to resume from.",
        "reliability/test_saving.py::test_there_is_always_a_checkpoint_to_go_on_from",
    ),
    Promise(
        "Atomic files",
        "Every file holds either its old or its new content; partial files are removed.",
        "reliability/test_saving.py::test_a_full_disk_tears_no_file",
        "metrics.jsonl and log.txt are appended to, and truncated to the checkpoint on resume.",
    ),
    Promise(
        "Full disk",
        "A disk that is too small is reported before the start; one that fills up ends the run with exit code 6.",
        "reliability/test_saving.py::test_a_disk_that_is_too_small_is_told_beforehand_and_one_that_fills_ends_the_run",
    ),
    Promise(
        "NaN, infinity",
        "NaN or infinity stops a run within a step, with exit code 5; it is not saved. The last good epoch is named.",
        "reliability/test_failures.py::test_no_number_stops_a_run_within_a_step",
        "On a GPU the values of a step are read after the next step.",
    ),
    Promise(
        "Full memory",
        "A run that runs out of memory ends with exit code 4, names the setting to lower, and can be resumed.",
        "reliability/test_failures.py::test_full_memory_names_the_setting_to_lower",
        _GPU,
    ),
    Promise(
        "Batches in parts",
        "With train.auto_batch, a batch that is too large is computed in parts, to the same result.",
        "reliability/test_failures.py::test_batches_in_parts_give_the_same_result",
        _GPU,
    ),
    Promise(
        "Stop",
        "Ctrl-C and SIGTERM stop a run after the current step or image, and it can be resumed.",
        "reliability/test_failures.py::test_a_signal_stops_a_run_that_can_go_on",
    ),
    Promise(
        "Two starts at once",
        "Only one run at a time uses a folder; a second run on a GPU waits, or is refused with --no-wait.",
        "reliability/test_two_starts.py::test_of_two_starts_in_a_folder_exactly_one_runs",
        "Waiting for a GPU is tested with the lock file only.",
    ),
    Promise(
        "Broken images",
        "Files that are not images, and images that are too large, are refused by name in bounded memory.",
        "reliability/test_image_files.py::test_broken_images_are_refused_by_name_in_bounded_memory",
    ),
    Promise(
        "Unusual images",
        "Orientation, transparency, 16 bits, palettes and CMYK are read as people see them, or refused with a message.",
        "reliability/test_image_files.py::test_odd_images_are_read_as_people_see_them_or_refused_in_words",
        "Colour profiles other than sRGB are not applied.",
    ),
    Promise(
        "Pickles",
        "Files that could run code when they are read are never opened.",
        "reliability/test_hostile_files.py::test_pickles_are_never_opened",
    ),
    Promise(
        "Hostile LoRA files",
        "Malformed safetensors files are refused with a message.",
        "reliability/test_hostile_files.py::test_hostile_safetensors_are_refused_in_words",
    ),
    Promise(
        "Fuzzed readers",
        "Fuzzed captions, configurations, LoRA files and archives are read, or refused with a message.",
        "reliability/test_fuzzing.py::test_whatever_is_sent_is_read_or_refused",
    ),
    Promise(
        "Code in a base",
        "Code that comes with a base model is never run: no eval, no shell, no trust_remote_code.",
        "reliability/test_hostile_files.py::test_code_that_comes_with_a_base_is_not_run",
    ),
    Promise(
        "Injection",
        "Names, prompts and captions are never used as a path, a flag or a script.",
        "reliability/test_injection.py::test_names_prompts_and_captions_stay_what_they_are",
    ),
    Promise(
        "Secrets",
        "Tokens in the environment are never written to a file.",
        "reliability/test_injection.py::test_secrets_are_written_nowhere",
    ),
    Promise(
        "Upgrade",
        "Checkpoints and LoRA files of every released version load; those of later versions are refused by version.",
        "reliability/test_upgrade.py::test_files_of_every_version_are_read",
    ),
    Promise(
        "Interoperation",
        "Every file loads in diffusers with a maximum difference of 0, under kohya's names.",
        "lora_files/test_interop.py::test_diffusers_loads_every_cell_without_any_error",
        "At small shapes; every run verifies its own file as well. ComfyUI and A1111 themselves are not run.",
    ),
    Promise(
        "Dead worker",
        "When a training process dies, the studio says so within 10 seconds and offers to resume.",
        "ui/pages/test_studio_in_browser.py::test_a_killed_worker_is_told_and_resumed",
    ),
    Promise(
        "Browser",
        "Closing, reloading or duplicating the page changes nothing; two clicks on Start start one run.",
        "ui/pages/test_studio_in_browser.py::test_one_worker_whatever_the_browser_does",
        "Tested in Chromium.",
    ),
    Promise(
        "Uploads",
        "Archives that contain paths, links, device names or zip bombs are refused as a whole.",
        "ui/state/test_uploads.py::test_hostile_zips_are_refused_whole",
    ),
    Promise(
        "Files over HTTP",
        "The studio serves only images that sdlora encoded itself.",
        "ui/server/test_server.py::test_hostile_addresses_give_nothing",
    ),
    Promise(
        "Hostile requests",
        "No request makes the studio read, write or fetch anything outside its folder, or fail inside.",
        "ui/server/test_fuzz.py::test_nothing_was_fetched_and_enough_was_asked",
        "The requests are random ones of the studio's routes.",
    ),
    Promise(
        "Exposure",
        "Other machines need a password: --host 0.0.0.0 is refused without one, and guesses are limited.",
        "ui/server/test_password.py::test_the_password_is_asked_and_guesses_are_few",
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
    rows, tests = [], []
    for promise in PROMISES:
        found = figures.get(promise.name, {"figure": "not run yet", "date": ""})
        meaning = f"{promise.meaning} {promise.note}".strip()
        rows.append(f"| {promise.name} | {meaning} | {found['figure']} | {found['date']} |")
        tests.append(f"| {promise.name} | `tests/{promise.test}` |")
    lines = [
        "# Reliability",
        "",
        "What sdlora promises when power, disks, memory or people interrupt a run, and when files are malformed. Each",
        "promise has a test, and each result is what that test found when it last ran.",
        "",
        "| Promise | Meaning | Result | Date |",
        "|---|---|---|---|",
        *rows,
        "",
        "    SDLORA_RECORD=1 pytest tests/reliability tests/ui tests/lora_files --slow",
        "    python tests/helpers/promises.py",
        "",
        "The first command runs the tests and records their results, the second one writes this page.",
        "",
        "<details><summary>The test of each promise</summary>",
        "",
        "| Promise | Test |",
        "|---|---|",
        *tests,
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
