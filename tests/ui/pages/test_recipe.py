"""The page of the recipe without a browser: one change after the other, and a start of what is seen."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from gradio.state_holder import SessionState
from helpers.studios import write_image

from sdlora.config.toml import load_config
from sdlora.ui.pages import recipe
from sdlora.ui.pages.app import build
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.more import marks, more_fields
from sdlora.ui.settings import draft as drafts
from sdlora.ui.settings.draft import Draft, read_draft, write_draft
from sdlora.ui.settings.recipes import OWN

SUBJECT, TRIGGER, LENGTH, BASE, NAME = range(5)
PLAN, PLANNED, START, CONTROLS = 3, 4, 5, 6


def place(name: str) -> int:
    return 5 + [field.name for field in more_fields()].index(name)


@pytest.fixture(autouse=True)
def with_plenty_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "estimate", lambda _: None)


class Page:
    """What a browser's page of the recipe holds."""

    def __init__(self, context: Context) -> None:
        self.context, self.parts = context, [""] * (CONTROLS + 5 + len(more_fields()))
        self.show(recipe.show(context, context.draft()))

    def show(self, updates: list[Any]) -> None:
        """Apply what a handler returned, through JSON as a browser gets it."""
        for index, update in enumerate(json.loads(json.dumps(updates))):
            if not isinstance(update, dict):
                self.parts[index] = update
            elif "value" in update:
                self.parts[index] = update["value"]

    @property
    def controls(self) -> list[Any]:
        return self.parts[CONTROLS:]

    def type(self, where: int, value: Any) -> list[Any]:
        """Change a control; returns the answer, which is not shown yet."""
        self.parts[CONTROLS + where] = value
        return recipe.change(self.context, where, value, base=self.controls[BASE])

    def start(self) -> tuple[str, str | None]:
        message, name, shown = recipe.start(self.context, self.controls, self.parts[PLANNED])
        self.show(shown)
        return message, name


@pytest.fixture
def page(context: Context, sleepers: list[psutil.Process]) -> Page:
    for number in range(3):
        write_image(context.studio.image_set("set") / f"{number}.png", (number, 90, 200)).with_suffix(
            ".txt"
        ).write_text(f"zumi number {number}", encoding="utf-8")
    write_draft(context.studio, Draft(images="set").with_values({"data.trigger": "zumi"}))
    return Page(context)


def started(page: Page, name: str) -> Any:
    return load_config(str(page.context.studio.job_config(name)))


def test_start_takes_what_the_page_shows(page: Page) -> None:
    page.show(page.type(LENGTH, "a first look"))
    page.show(page.type(place("train.learning_rate"), "0,0005"))
    assert "each seen 24 times" in page.parts[PLAN]
    _, name = page.start()
    assert name == "set"
    config = started(page, "set")
    assert (config.train.epochs, config.data.repeats_range, config.train.learning_rate) == (2, (12, 12), 0.0005)
    assert page.controls[NAME] == "" and read_draft(page.context.studio).name == ""


def test_two_changes_at_once_both_count(page: Page) -> None:
    # Both are sent before the first one's answer is there.
    first, second = page.type(LENGTH, "thorough"), page.type(place("seed"), "7")
    page.show(first)
    page.show(second)
    assert page.controls[place("train.epochs")] == "5" and page.controls[LENGTH] == "thorough"
    _, name = page.start()
    assert name is not None
    config = started(page, name)
    assert (config.train.epochs, config.data.repeats_range, config.seed) == (5, (50, 50), 7)


@pytest.mark.parametrize(
    ("where", "value"),
    [(LENGTH, "a first look"), (SUBJECT, "style"), (TRIGGER, "mizu"), (place("train.epochs"), "2"), (BASE, "owner/x")],
)
def test_start_is_refused_while_the_plan_is_of_other_settings(page: Page, where: int, value: str) -> None:
    page.parts[CONTROLS + where] = value  # and its change never arrives
    told, name = page.start()
    assert name is None and "press Start again" in told.replace("\n", " ")
    assert page.context.jobs.names() == []
    _, name = page.start()
    assert name is not None, "the plan is that of the page now"


def test_start_takes_the_set_that_its_own_tab_shows(page: Page) -> None:
    write_draft(page.context.studio, page.context.draft().with_images("builtin:zumi"))  # by another tab
    _, name = page.start()
    assert name == "set"
    assert started(page, "set").data.folders == [str(page.context.studio.image_set("set").resolve())]


def test_what_cannot_be_read_is_refused_by_name_and_cannot_be_started(page: Page) -> None:
    page.show(page.type(place("train.learning_rate"), "fast"))
    assert "“Learning rate”" in page.parts[PLAN] and page.parts[PLANNED] == ""
    answer = page.type(place("seed"), "7")
    assert answer[START]["interactive"]
    page.show(answer)
    told, name = page.start()
    assert name is None and "“Learning rate”" in told


@pytest.mark.parametrize("base", ["<b>x</b>", "/no/such/model", "models/missing.safetensors"])
def test_a_base_that_cannot_be_keeps_start_from_being_pressed(page: Page, base: str) -> None:
    answer = page.type(BASE, base)
    assert "There is no base model" in answer[0] and "<b>" not in answer[0]
    assert (answer[PLANNED], answer[START]["interactive"]) == ("", False)
    page.show(answer)
    _, name = page.start()
    assert name is None
    # It stands there still when something else is changed, and changes nothing of the recipe.
    page.show(page.type(LENGTH, "thorough"))
    answer = page.type(place("seed"), "7")
    assert "There is no base model" in answer[0]
    assert (answer[PLANNED], answer[START]["interactive"]) == ("", False)
    assert (page.context.draft().base, page.context.draft().length) == ("pocket", "thorough")
    answer = page.type(BASE, "pocket")
    assert answer[START]["interactive"] and "There is no base model" not in answer[0]


@pytest.mark.parametrize("draft", [Draft(), Draft(images="empty")])
def test_nothing_can_be_started_without_images(context: Context, draft: Draft) -> None:
    write_draft(context.studio, draft)
    assert not recipe.show(context, draft)[START]["interactive"]


def test_what_is_shown_is_what_is_sent_back(page: Page) -> None:
    for draft in (
        Draft(images="set").with_answers("style", "thorough", "owner/name"),
        Draft(images="set").with_values(
            {"train.learning_rate": 1e-5, "seed": 2**60, "lora.target_ranks": {"mlp": 4}, "preview.seeds": [3]}
            | {"lora.targets": ["mlp", "cross_attention"], "preview.prompts": ["a", "b"], "data.background": "#fff"}
        ),
    ):
        write_draft(page.context.studio, draft)
        page.show(recipe.show(page.context, draft))
        again = recipe.read(page.context, page.controls)
        assert recipe.fingerprint(again) == recipe.fingerprint(draft) == page.parts[PLANNED]


def test_controls_that_hold_their_values_are_left_alone(page: Page) -> None:
    draft = page.context.draft().with_value("seed", 9)
    answer = recipe.show_again(page.context, draft, page.controls)
    assert answer[CONTROLS + place("seed")] == "9"
    assert [update for update in answer[CONTROLS:] if update != gr.skip()] == ["9"]


def test_what_the_page_does_not_show_is_kept(page: Page, context: Context) -> None:
    sets = [{"folder": str(context.studio.image_set(name)), "repeats": 2} for name in ("set",)]
    several = Draft().with_values({"data.sets": sets, "data.exclude": ["set/0.png"], "data.trigger": "zumi"})
    write_draft(context.studio, replace(several, subject=OWN))
    page.show(recipe.show(context, context.draft()))
    assert recipe.read(context, page.controls).value("data.exclude") == ["set/0.png"]


def test_what_the_run_needs_is_worked_out_after_the_page_is_shown(context: Context, page: Page) -> None:
    page.show(recipe.show_unplanned(context, context.draft()))
    assert page.parts[PLANNED] == "" and "Working out" in page.parts[PLAN], "nothing can be started before"


def test_own_settings_are_shown_as_such(page: Page) -> None:
    answer = page.type(place("train.epochs"), "3")
    assert answer[CONTROLS + LENGTH]["value"] == OWN and OWN in answer[CONTROLS + LENGTH]["choices"]
    page.show(answer)
    answer = page.type(LENGTH, "as usual")
    assert answer[CONTROLS + place("train.epochs")] == "4"
    assert OWN not in answer[CONTROLS + LENGTH]["choices"]


def test_changes_and_their_origin_are_shown(page: Page) -> None:
    page.show(page.type(place("seed"), "7"))
    assert "From quickstart" in page.parts[1] and "Set by you" in page.parts[1] and "Seed" in page.parts[1]
    assert "#set-seed" in page.parts[2] and "#set-lora-rank" in page.parts[2]
    assert "#set-lora-dora" not in page.parts[2]
    assert marks([]) == ""


def test_cloned_settings_leave_what_belongs_to_their_set(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "quick.toml"
    file.write_text("[data]\nfolder = 'builtin:zumi'\ntrigger = 'zumi'\nvalidation_folder = 'builtin:zumi/holdout'\n")
    recipe.load_settings(page.context, str(file))
    draft = page.context.draft().with_images("set")
    write_draft(page.context.studio, draft)
    page.show(recipe.show(page.context, draft))
    assert page.controls[TRIGGER] == "" and page.controls[place("data.validation_folder")] == ""
    assert page.controls[NAME] == "set"


def test_values_reach_the_handlers_whatever_gradio_has_listed(page: Page) -> None:
    blocks = build(page.context)
    handlers = {fn.name: fn for fn in blocks.fns.values()}
    for name in ("on_change", "on_start", "measure", "refresh"):
        assert not handlers[name].preprocess, name
    # An epoch of the run that was looked at before.
    sent = ["gone", "7", "", "", "{}"]
    assert asyncio.run(blocks.process_api(handlers["refresh"], sent, state=SessionState(blocks)))["data"]
    # Gradio makes a component anew, with another number, when an update changes more than its value.
    elements = {block.elem_id for block in handlers["on_change"].inputs if block.elem_id}
    assert len(elements) >= len(page.controls), "every control has an element of its own"
    anew = gr.Radio(["own settings"], elem_id="length", render=False)
    page.parts[CONTROLS + LENGTH] = "a first look"
    page.show(handlers["on_change"].fn(gr.EventData(anew, None), "set", *page.controls))
    assert page.controls[place("train.epochs")] == "2"
