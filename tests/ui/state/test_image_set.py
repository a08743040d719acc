"""Captions are saved where training reads them, and the doctor's word is told for each image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.hostile import CAPTIONS
from helpers.studios import write_image
from PIL import Image

from sdlora.common.bundled import ImageFolder, resolve_data_folder
from sdlora.data.dataset import load_dataset
from sdlora.errors import SdloraError
from sdlora.ui.pages.images import MAX_CARDS, cards_by_page
from sdlora.ui.state import decoded, image_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "set"
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        write_image(made / f"{name}.png", color, (600, 520))
        (made / f"{name}.txt").write_text(f"a {color} thing", encoding="utf-8")
    return made


def test_every_image_has_severity_and_findings(tmp_path: Path) -> None:
    source = resolve_data_folder("builtin:zumi")
    with Image.open(source / "zumi_00.png") as first, Image.open(source / "zumi_01.png") as second:
        one, two = first.convert("RGB").resize((600, 600)), second.convert("RGB").resize((600, 600))
    one.save(tmp_path / "one.png")
    one.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    two.save(tmp_path / "two.png")
    two.rotate(90).resize((100, 100)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("one", "mirrored", "small", "broken"):
        (tmp_path / f"{name}.txt").write_text("zumi waving" if name != "one" else "somebody", encoding="utf-8")
    view = image_set.view(tmp_path, trigger="zumi")
    cards = {card.name: card for card in view.cards}
    assert {name: card.severity for name, card in cards.items()} == {
        "broken.png": "error", "mirrored.png": "warning", "one.png": "warning", "small.png": "warning",
        "two.png": "error",
    }  # fmt: skip
    assert "no caption" in cards["two.png"].findings[0]
    assert any("trigger" in reason for reason in cards["one.png"].findings)
    assert any("mirrored.png" in reason for reason in cards["one.png"].findings)
    assert any("enlarged" in reason for reason in cards["small.png"].findings)
    assert (
        view.twins == (("mirrored.png", "one.png"),)
        and sum(finding.severity == "error" for finding in view.findings) == 2
    )
    assert image_set.view(tmp_path / "nothing").cards == ()


@pytest.mark.parametrize("caption", CAPTIONS)
def test_saved_caption_is_what_training_reads(caption: str, folder: Path) -> None:
    before = set(folder.rglob("*"))
    image_set.write_captions(folder, {"a.png": caption})
    assert set(folder.rglob("*")) == before
    dataset = load_dataset(ImageFolder(str(folder), caption="none"))
    expected = " ".join(caption.replace("\0", " ").split()).removeprefix("\ufeff") or "none"
    assert dataset.examples[0].caption == expected
    assert image_set.view(folder).cards[0].caption == ("" if expected == "none" else expected)


@pytest.mark.parametrize("name", ["../x.png", "nothing.png", "a.txt", "/etc/passwd", ""])
def test_caption_of_a_foreign_image_is_refused(name: str, folder: Path) -> None:
    for action in (
        lambda: image_set.write_captions(folder, {name: "x"}),
        lambda: image_set.caption_files(folder, name),
    ):
        with pytest.raises(SdloraError, match="no image"):
            action()


def test_kohya_folders_are_read_as_training_reads_them(tmp_path: Path) -> None:
    for name, color in (("10_zumi/a.png", "red"), ("5_style/a.png", "blue"), ("reg/1_cat/c.png", "green")):
        write_image(tmp_path / name, color, (600, 520))
    (tmp_path / "10_zumi/a.caption").write_text("zumi waving")
    view = image_set.view(tmp_path, trigger="zumi")
    assert [(card.name, card.caption, card.common_caption) for card in view.cards] == [
        ("10_zumi/a.png", "zumi waving", "zumi"), ("5_style/a.png", "", "style"),
    ]  # fmt: skip
    assert view.preserved == ("reg/1_cat", 1) and view.cards[1].severity == "warning"  # its caption lacks the trigger
    image_set.write_captions(tmp_path, {"5_style/a.png": "zumi in blue"})
    assert image_set.view(tmp_path, trigger="zumi").findings == ()
    assert [card.name for card in image_set.view(tmp_path, taken_out=["10_zumi/a.png"]).cards] == ["5_style/a.png"]


def test_a_fingerprint_follows_the_images(folder: Path) -> None:
    before = image_set.fingerprint(folder)
    image_set.write_captions(folder, {"a.png": "other words"})
    assert image_set.fingerprint(folder) == before, "text that is being typed is not drawn anew"
    (folder / "b.png").unlink()
    after = image_set.fingerprint(folder)
    write_image(folder / "a.png", "yellow", (500, 500))
    assert len({before, after, image_set.fingerprint(folder), image_set.fingerprint(folder / "none")}) == 4


def test_editing_captions_replaces_metadata_file(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.txt").unlink()
    lines = "".join(f'{{"file_name": "{name}.png", "text": "listed {name}"}}\n' for name in "abc")
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    image_set.write_captions(folder, {"b.png": "edited"})
    assert [card.caption for card in image_set.view(folder).cards] == ["listed a", "edited", "listed c"]
    assert not [f for f in image_set.view(folder).findings if f.severity == "error"]


def test_editing_a_caption_sets_files_aside_that_would_contradict_it(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "A.TXT")
    (folder / "b.txt").unlink()
    (folder / "b.json").write_text('{"tags": ["one", "two"]}')
    assert [card.caption for card in image_set.view(folder).cards][1] == "one, two"
    image_set.write_captions(folder, {"a.png": "first"})
    image_set.write_captions(folder, {"b.png": "second"})
    assert [card.caption for card in image_set.view(folder).cards][:2] == ["first", "second"]
    assert not [f for f in image_set.view(folder).findings if f.severity == "error"]
    assert (folder / "A.TXT").read_text() == "first" and not (folder / "a.txt").exists()
    assert (folder / "b.json.before").exists()
    assert image_set.caption_files(folder, "a.png") == ["A.TXT"]


def test_large_set_is_paged(folder: Path) -> None:
    (card,) = image_set.view(folder).cards[:1]
    many = tuple(replace(card, name=f"{n:03}.png", severity="warning" if n % 7 == 0 else "fine") for n in range(500))
    pages = cards_by_page(many)
    assert next(iter(pages)) == "1 to 48 of 500" and list(pages)[-1] == "481 to 500 of 500"
    parts = [tuple(part) for part in pages.values()]
    assert sum(parts, ()) == many and max(map(len, parts)) == MAX_CARDS
    assert list(cards_by_page(image_set.view(folder).cards)) == ["1 to 3 of 3"]
    assert list(cards_by_page(()).values()) == [()]


def test_unchanged_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set.view(folder)
    monkeypatch.setattr(decoded, "decode", lambda *_: pytest.fail("decoded again"))
    image_set.write_captions(folder, {"a.png": "new words"})
    assert image_set.view(folder).cards[0].caption == "new words"


def test_the_state_of_a_set_changes_with_captions_and_images(folder: Path) -> None:
    states = [image_set.state(folder)]
    assert image_set.state(folder) == states[0]
    image_set.write_captions(folder, {"a.png": "other words"})
    states.append(image_set.state(folder))
    (folder / "a.png").unlink()
    states.append(image_set.state(folder))
    assert len(set(states)) == 3


def test_a_first_look_has_images_and_captions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "cached_decode", lambda *_: pytest.fail("decoded"))
    looked = image_set.first_look(folder, taken_out=["b.png"])
    whole = image_set.view(folder, taken_out=["b.png"])
    assert [(card.name, card.caption) for card in looked.cards] == [(card.name, card.caption) for card in whole.cards]
    assert {card.severity for card in looked.cards} == {"unchecked"} and not looked.is_checked and whole.is_checked
