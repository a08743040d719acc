"""The page of images in a browser: captions stay with their image, and a tab acts on the set that it shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.browsing import CHROMIUM, Open, browser_page, enter, open_studio
from helpers.studios import write_image

from sdlora.ui.state.folders import Studio

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"), pytest.mark.slow]
NAMES = [f"p{number:02d}.png" for number in range(50)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """A studio with two sets; the first needs two pages."""
    root = tmp_path_factory.mktemp("images")
    studio = Studio(root / "runs")
    studio.create()
    for number, name in enumerate(NAMES):
        image = write_image(studio.image_set("many") / name, (number * 5, 90, 255 - number * 5), (64, 64))
        image.with_suffix(".txt").write_text(f"thing {number}", encoding="utf-8")
    for number, name in enumerate(NAMES[:3]):
        image = write_image(studio.image_set("few") / name, (90, number * 80, 200), (64, 64))
        image.with_suffix(".txt").write_text(f"other {number}", encoding="utf-8")
        write_image(root / "my drawings" / name, (200, number * 80, 20), (64, 64))
    with open_studio(studio.runs) as found:
        yield found


@pytest.fixture
def page(browser: Any, opened: Open) -> Iterator[Any]:
    with browser_page(browser, opened, patience_ms=90_000) as found:
        yield found


def choose(page: Any, images: str, first: str) -> None:
    """Choose a set, once the page is filled, and wait until the first caption is shown."""
    page.locator("#set-summary .sd").first.wait_for()
    page.fill("#set input", images)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    wait_for_caption(page, 0, first)


def wait_for_caption(page: Any, place: int, text: str) -> None:
    page.wait_for_function(
        "([place, text]) => document.querySelectorAll('#cards textarea')[place]?.value === text", arg=[place, text]
    )


def caption(opened: Open, images: str, name: str) -> str:
    return (opened.runs / "pictures" / images / name).with_suffix(".txt").read_text(encoding="utf-8")


def unfold(page: Any) -> None:
    if page.locator("#all-captions > button:not(.open)").count():
        page.click("#all-captions > button")


def test_a_typed_caption_stays_with_its_image(page: Any, opened: Open) -> None:
    choose(page, "many", "thing 0")
    page.get_by_label("Caption of p00.png").fill("typed for the first")
    page.locator(".card", has_text="p00.png").locator(".saved", has_text="Saved").wait_for()
    # Another page, another set, and back.
    page.click("#cards-page input")
    page.get_by_role("option", name="49 to 50 of 50").click()
    wait_for_caption(page, 0, "thing 48")
    choose(page, "few", "other 0")
    choose(page, "many", "typed for the first")
    # An image that sorts first, by way of the disk: the tab follows, and what is being typed stays.
    area = page.get_by_label("Caption of p01.png")
    area.fill("typed for the second")
    area.focus()
    image = write_image(opened.runs / "pictures" / "many" / "a.png", "white", (64, 64))
    page.locator(".card[data-image='a.png']").wait_for()
    assert area.input_value() == "typed for the second" and area.evaluate("one => one === document.activeElement")
    values = page.locator("#cards textarea").evaluate_all("all => all.slice(0, 4).map(one => one.value)")
    assert values == ["", "typed for the first", "typed for the second", "thing 2"]
    image.unlink()
    page.locator(".card[data-image='a.png']").wait_for(state="detached")
    # All of them at once, and undone.
    unfold(page)
    page.get_by_label("Find", exact=True).fill("t")
    page.get_by_label("Replace with", exact=True).fill("T")
    page.get_by_role("button", name="Replace in all captions").click()
    page.locator("#captions-note del").first.wait_for()
    assert caption(opened, "many", "p02.png") == "thing 2", "nothing is changed before it is confirmed"
    page.click("#apply-captions")
    wait_for_caption(page, 0, "Typed for The firsT")
    wait_for_caption(page, 2, "Thing 2")
    page.click("#undo")
    wait_for_caption(page, 0, "typed for the first")
    assert [caption(opened, "many", name) for name in NAMES[:3]] == [
        "typed for the first", "typed for the second", "thing 2",
    ]  # fmt: skip


def test_a_tab_acts_on_the_set_that_it_shows(page: Any, opened: Open) -> None:
    choose(page, "few", "other 0")
    other = page.context.new_page()
    enter(other, opened)
    choose(other, "many", caption(opened, "many", "p00.png"))
    before = caption(opened, "many", "p05.png")
    unfold(page)
    page.get_by_label("Find", exact=True).fill("o")
    page.get_by_label("Replace with", exact=True).fill("0")
    page.get_by_role("button", name="Replace in all captions").click()
    page.locator("#apply-captions", has_text="3").click()
    page.locator("#captions-note", has_text="3 captions were changed").wait_for()
    assert (caption(opened, "few", "p01.png"), caption(opened, "many", "p05.png")) == ("0ther 1", before)
    page.click("#undo")
    wait_for_caption(page, 1, "other 1")
    page.locator(".card[data-image='p02.png'] .remove").first.click()
    page.locator(".card[data-image='p02.png']").wait_for(state="detached")
    assert not (opened.runs / "pictures" / "few" / "p02.png").exists()
    assert (opened.runs / "pictures" / "many" / "p02.png").exists()
    page.locator("#undo", has_text="p02.png").click()
    wait_for_caption(page, 2, "other 2")
    other.close()


def test_a_folder_of_the_artists_own_is_asked_about_once(page: Any, opened: Open) -> None:
    folder = opened.runs.parent / "my drawings"
    page.locator("#set-summary .sd").first.wait_for()
    page.fill("#set input", f"{folder}x")
    page.keyboard.press("Enter")
    page.locator("#set-summary", has_text="There is no folder").wait_for()
    choose(page, str(folder), "")
    before = sorted(folder.iterdir())
    assert page.get_by_label("Caption of p00.png").get_attribute("readonly") is not None
    page.locator(".card[data-image='p01.png'] .remove").first.click()
    page.locator("#undo", has_text="p01.png").wait_for()
    assert sorted(folder.iterdir()) == before
    page.click("#allow-saving")
    page.locator("#allow-saving").wait_for(state="hidden")
    page.get_by_label("Caption of p00.png").fill("mine")
    page.locator(".card", has_text="p00.png").locator(".saved", has_text="Saved").wait_for()
    assert (folder / "p00.txt").read_text(encoding="utf-8") == "mine"
    page.reload()
    wait_for_caption(page, 0, "mine")
    assert page.locator("#cards .card").count() == 2 and not page.locator("#allow-saving").is_visible()
