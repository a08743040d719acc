"""Messages on the pages name options as the pages do, and say what to press."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from helpers.studios import write_image

from sdlora.config.toml import option_fields
from sdlora.data.checks import Kind
from sdlora.errors import SdloraError
from sdlora.ui.html import views
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.recipe import plan_html
from sdlora.ui.settings import wording
from sdlora.ui.settings.draft import Draft
from sdlora.ui.settings.wording import in_a_word, in_words

COMMAND_LINE = re.compile(
    "|".join(
        [r"NAME\.txt", r"(?<![\w-])--[a-z]", "`sdlora", *(re.escape(name) for name in option_fields() if "." in name)]
    )
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.epochs: found 9.", "“Epochs” (under More, Training): found 9."),
        ("Set data.recursive = true to", "Turn on “Recursive” (under More, Images and captions) to"),
        ("or set data.buckets = false.", "or turn off “Buckets” (under More, Images and captions)."),
        ("set base.path to it", "set “Base model” to it"),
        ("lora.rank = 4", "“Rank” (under More, Size and layers) = 4"),
        ("train.exposures and train.text_encoder_learning_rate", "“Exposures” (under More, Training) and"),
        ("my.data.folder/x, data.sets.0", "my.data.folder/x, "),
    ],
)  # fmt: skip
def test_options_are_named_as_on_the_page(text: str, words: str) -> None:
    assert in_words(text).startswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "To resume: --resume --set train.batch_size=1.",
            "To resume: press “Clone into the recipe” under Runs, and set",
        ),
        (
            "it cannot be written: full. Choose another folder with --output.",
            "it cannot be written: full. Choose another n",
        ),
        ("Finish it with --resume.", "Press Resume under Training."),
        ("Use the preset, or give --force to train with these settings.", "Use the preset."),
        (
            "Every image has a caption. Use --overwrite to replace them.",
            "Every image has a caption. Clear a caption to",
        ),
        ("a.png: no caption; write a.txt yourself.", "a.png: no caption; write one yourself."),
    ],
)
def test_flags_of_commands_are_told_as_what_to_press(text: str, words: str) -> None:
    assert in_words(text).startswith(words) and not COMMAND_LINE.search(in_words(text))


def test_values_are_shown_in_words() -> None:
    values = [True, 0.00025, ["self_attention", "mlp"], None, "", {}, 3, [{"folder": "x"}]]
    shown = ["on", "0.00025", "self attention, mlp", "none", "none", "none", "3", "[{'folder': 'x'}]"]
    assert [in_a_word(value) for value in values] == shown


def test_findings_in_the_plan_have_no_words_of_the_command_line(context: Context, tmp_path: Path) -> None:
    studio = context.studio
    write_image(studio.image_set("bare") / "a.png")
    (studio.image_set("parent") / "inner").mkdir(parents=True)
    write_image(studio.image_set("parent") / "inner" / "a.png")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"not a file of weights")
    bad = [
        Draft(images="bare"), Draft(images="parent"), Draft(images="builtin:zumi").with_values({"train.epochs": 9}),
        Draft(images="builtin:zumi").with_values({"base.path": str(lora)}),
        Draft(images="builtin:zumi").with_values({"base.family": "sdxl"}),
        Draft(images="builtin:zumi").with_values({"data.masks": "file"}),
        Draft(images="builtin:zumi").with_values({"loss.mask_floor": 0.3}),
        Draft(images="builtin:zumi").with_values({"data.validation_folder": "builtin:zumi"}),
        Draft(images="builtin:zumi").with_values({"train.learning_rate": 0.5}),
    ]  # fmt: skip
    for draft in bad:
        told, _ = plan_html(context, draft)
        assert not COMMAND_LINE.search(told), told
    assert "Allow trigger only" in plan_html(context, bad[0])[0]


def test_every_finding_is_told_in_words_of_the_pages_with_what_to_press(context: Context, tmp_path: Path) -> None:
    assert set(get_args(Kind)) == set(wording._TO_PRESS)
    folder = context.studio.image_set("odd")
    for name in ("a", "b", "c"):
        write_image(folder / f"{name}.png", "red")
    (folder / "a.txt").write_text("one thing")
    (folder / "a.caption").write_text("another thing")
    (folder / "nobody.txt").write_text("unused")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "scan.psd").write_bytes(b"")
    write_image(folder / "long.png", "blue", (600, 30)).with_suffix(".txt").write_text("many words " * 60)
    (folder / "gone.png").symlink_to(tmp_path / "gone")
    write_image(folder / "inner" / "x.png")
    view = context.view_set(Draft(images="odd").with_values({"data.trigger": "zumi"}))
    assert len({finding.kind for finding in view.findings}) >= 9
    html = views.set_summary(view) + views.set_cards(view.cards, folder, context.studio.shown, "odd")
    html += views.duplicates(view, context.studio.shown, "odd")
    assert not COMMAND_LINE.search(html), COMMAND_LINE.findall(html)
    told = {finding.kind: finding.message for finding in view.findings}
    assert "below each image" in told["no caption"] and "“Take out”" in told["duplicate"]
    assert "“Add the trigger word to all captions”" in told["no trigger"]


def test_refused_actions_have_no_words_of_the_command_line(context: Context) -> None:
    def refuse() -> str:
        raise SdloraError("Set data.allow_trigger_only = true.")

    assert "Turn on “Allow trigger only”" in context.attempt(refuse)
