"""Captions are counted in tokens, and what no window has room for is told."""

from __future__ import annotations

from helpers.studios import write_image

from sdlora.common.bundled import pocket_folder
from sdlora.models.unet import clip_tokenizer
from sdlora.ui.pages.context import Context
from sdlora.ui.settings.draft import Draft
from sdlora.ui.state.token_windows import read_caption


def test_words_beyond_the_window_are_told() -> None:
    caption = ", ".join(f"tag {number}" for number in range(40))
    reading = read_caption(caption, 1, is_pocket=False)
    tokenizer = clip_tokenizer("<|endoftext|>")
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    assert (reading.num_tokens, reading.most) == (len(ids), 75)
    assert caption.endswith(reading.unread) and reading.unread
    kept = caption.removesuffix(reading.unread)
    assert len(tokenizer(kept, add_special_tokens=False).input_ids) == 75
    assert read_caption(caption, 8, is_pocket=False).unread == ""


def test_the_built_in_base_reads_its_own_words() -> None:
    assert pocket_folder().is_dir()
    assert read_caption("zumi in a meadow", 1, is_pocket=True).num_tokens > 0
    assert read_caption("", 1, is_pocket=True).num_tokens == 0


def test_cards_tell_how_much_of_a_caption_is_read(context: Context) -> None:
    image = write_image(context.studio.image_set("set") / "a.png")
    image.with_suffix(".txt").write_text("long words " * 60, encoding="utf-8")
    draft = Draft(images="set").with_values({"base.path": "someone/else"})
    (card,) = context.view_set(draft).cards
    assert card.reading is not None and card.reading.unread.endswith("words") and card.severity == "warning"
    (card,) = context.view_set(draft.with_values({"data.max_token_windows": 2})).cards
    assert card.reading is not None and (card.reading.most, card.reading.unread) == (150, "")
    (longer,) = context.view_set(draft.with_values({"data.trigger": "zumi", "data.max_token_windows": 2})).cards
    assert longer.reading is not None and longer.reading.num_tokens > card.reading.num_tokens, "the trigger counts"
