import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sdlora.common.bundled import CaptionOptions
from sdlora.data import captions as captions_module
from sdlora.data.captions import (
    caption_for_exposure,
    caption_in,
    fixed_captions,
    lacks_trigger,
    prior_caption,
    read_captions,
    read_metadata,
    text_sidecar,
    with_trigger,
)
from sdlora.errors import DataError


def exposure(number: int, caption: str = "a, b, c, d, e", trigger: str | None = None, **options: Any) -> str:
    chosen = CaptionOptions(**options)
    return caption_for_exposure(caption, chosen, trigger=trigger, seed=0, example="x.png", exposure=number)


def exposures(caption: str, count: int = 200, trigger: str | None = None, **options: Any) -> list[str]:
    """The texts of the first exposures, which are the same when asked for again in another order."""
    found = [exposure(number, caption, trigger, **options) for number in range(1, count + 1)]
    again = [exposure(number, caption, trigger, **options) for number in range(count, 0, -1)]
    assert found == again[::-1]
    return found


def fixed(caption: str, trigger: str | None = None, **options: Any) -> list[str]:
    return fixed_captions(caption, CaptionOptions(**options), trigger)


def test_sidecars_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeff one \n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "d.caption").write_text("four\n")
    lines = [{"file_name": "b.png", "text": "two"}, {"file_name": "c.png", "text": "drei ü"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    names = ["a.png", "b.png", "d.png", "empty.png", "none.png"]
    assert read_captions(tmp_path, names) == (
        {
            "a.png": {"a.txt": "one"}, "b.png": {"metadata.jsonl": "two"}, "d.png": {"d.caption": "four"},
            "empty.png": {"empty.txt": ""}, "none.png": {},
        },
        ["c.png"],
        [],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("a cat ", "a cat"),
        (["a cat", "a grey cat"], "a cat\na grey cat"),
        ({"caption": "a cat"}, "a cat"),
        ({"text": "a cat", "score": 3}, "a cat"),
        ({"tags": "cat, grey"}, "cat, grey"),
        ({"tags": ["cat", " grey"]}, "cat, grey"),
        ({"caption": ["one", "two"], "tags": ["cat", "grey"]}, "one, cat, grey\ntwo, cat, grey"),
        ({"caption": "same", "text": "same"}, "same"),
        ({"rating": "safe", "tags": None}, ""),
        (None, ""),
    ],
)
def test_json_sidecars(tmp_path: Path, value: object, caption: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_captions(tmp_path, ["a.png"]) == ({"a.png": {"a.json": caption}}, [], [])


@pytest.mark.parametrize(
    "text", ["{", "3", '{"tags": 3}', '{"caption": [1]}', '"\\ud800"', '{"caption": "a", "text": "b"}']
)
def test_broken_json_sidecar_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    found, _, ((file, message),) = read_captions(tmp_path, ["a.png"])
    assert (found, file) == ({"a.png": {"a.json": ""}}, "a.json")
    assert message.startswith("a.json: ")


def test_case_counts_only_between_images_that_differ_in_it(tmp_path: Path) -> None:
    for name, text in {
        "b.TXT": "b",
        "C.Caption": "c",
        "D.TXT": "D",
        "d.txt": "d",
        "other.JSON": "{",
        "e.txt": "e",
    }.items():
        (tmp_path / name).write_text(text)
    found, unused, faults = read_captions(tmp_path, ["B.PNG", "c.jpg", "D.png", "d.png"])
    assert found == {
        "B.PNG": {"b.TXT": "b"}, "c.jpg": {"C.Caption": "c"}, "D.png": {"D.TXT": "D"}, "d.png": {"d.txt": "d"},
    }  # fmt: skip
    assert (unused, faults) == (["e.txt"], [])
    files = {"B.PNG": "b.TXT", "D.png": "D.TXT", "d.png": "d.txt", "new.png": "new.txt"}
    for name in ("D.png", "d.png"):
        (tmp_path / name).touch()
    assert {name: text_sidecar(tmp_path / name).name for name in files} == files
    (tmp_path / "D.TXT").unlink()
    assert text_sidecar(tmp_path / "D.png").name == "D.txt"


def test_captions_of_subfolders_are_beside_their_images_or_in_any_metadata_above(tmp_path: Path) -> None:
    for folder in ("x", "y/z"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "x/a.txt").write_text("in x")
    (tmp_path / "a.txt").write_text("alone")
    (tmp_path / "y/z/metadata.jsonl").write_text('{"file_name": "b.png", "text": "in z"}')
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x/c.png", "text": "in x, too"}\n{')
    found, unused, faults = read_captions(tmp_path, ["x/a.png", "x/c.png", "y/z/b.png"])
    assert found == {
        "x/a.png": {"x/a.txt": "in x"}, "x/c.png": {"metadata.jsonl": "in x, too"},
        "y/z/b.png": {"y/z/metadata.jsonl": "in z"},
    }  # fmt: skip
    assert (unused, [file for file, _ in faults]) == (["a.txt"], ["metadata.jsonl"])


@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "a.png"}', '{"file_name": 3, "text": "x"}', "3"])
def test_broken_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line + "\n")
    captions, (message,) = read_metadata(tmp_path / "metadata.jsonl")
    assert captions == {"a.png": "x"}
    assert "metadata.jsonl, line 2: " in message


def test_an_image_with_two_captions_in_one_list_is_told(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": text} for text in ("one", "one", "two")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions, (message,) = read_metadata(tmp_path / "metadata.jsonl")
    assert captions == {"a.png": "one"}
    assert "line 3: another caption of a.png is in line 1" in message


def test_line_separators_in_captions_do_not_end_a_line(tmp_path: Path) -> None:
    lines = [{"file_name": f"{name}\u2028.png", "text": "one\u2028two\x85three"} for name in "ab"]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    captions, faults = read_metadata(tmp_path / "metadata.jsonl")
    assert captions == {line["file_name"]: line["text"] for line in lines} and not faults


def test_unreadable_captions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, most_bytes: int) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    for name in ("a.txt", "metadata.jsonl"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(captions_module, "read_text", refuse)
    faults = read_captions(tmp_path, ["a.png"]).faults
    assert faults == [
        ("metadata.jsonl", "metadata.jsonl: cannot be read (Permission denied)."),
        ("a.txt", "a.txt: cannot be read (Permission denied)."),
    ]


def test_files_in_other_encodings_are_named(tmp_path: Path) -> None:
    for name in ("latin.txt", "metadata.jsonl"):
        (tmp_path / name).write_bytes("café".encode("latin-1"))
    (tmp_path / "good.txt").write_text("x")
    captions, _, faults = read_captions(tmp_path, ["latin.png", "good.png"])
    assert captions == {"latin.png": {"latin.txt": ""}, "good.png": {"good.txt": "x"}}
    assert [(file, message.split(" (")[0]) for file, message in faults] == [
        ("metadata.jsonl", "metadata.jsonl: not valid UTF-8"), ("latin.txt", "latin.txt: not valid UTF-8"),
    ]  # fmt: skip


def test_trigger_is_put_in_front_unless_contained() -> None:
    assert with_trigger("a cat", "zumi") == "zumi, a cat"
    assert with_trigger("a big Zumi, waving", "zumi") == "a big Zumi, waving"
    assert with_trigger("zumis", "zumi") == "zumi, zumis"
    assert with_trigger("azumi", "zumi") == "zumi, azumi"
    assert with_trigger("", "zumi") == "zumi"
    assert with_trigger("a cat", None) == "a cat"


def test_tags_are_shuffled_by_exposure_except_kept_tags() -> None:
    found = [exposure(number, shuffle_tags=True, keep_tags=2) for number in range(30)]
    assert all(text.startswith("a, b, ") for text in found)
    assert all(sorted(text.split(", ")) == list("abcde") for text in found)
    assert len(set(found)) == 6
    assert found == [exposure(number, shuffle_tags=True, keep_tags=2) for number in range(30)]
    assert exposure(1, shuffle_tags=True, keep_tags=1, trigger="zumi").startswith("zumi, ")


def test_dropout_is_a_share_of_exposures() -> None:
    dropped = sum(exposure(number, caption_dropout=0.3) == "" for number in range(2000))
    assert 520 < dropped < 680
    assert exposure(1, caption_dropout=1.0, trigger="zumi") == ""
    assert all(exposure(number) == "a, b, c, d, e" for number in range(100))


def test_tags_are_dropped_except_kept_and_protected_ones_and_the_trigger() -> None:
    found = exposures("a, b, C, big Zumi, e", 1000, "zumi", tag_dropout=0.4, protected_tags=("c",))
    assert all(text.startswith("a") and "C, big Zumi" in text for text in found)
    assert set(found) == {f"a{b}, C, big Zumi{e}" for b in ("", ", b") for e in ("", ", e")}
    kept = Counter(tag for text in found for tag in text.split(", "))
    assert 550 < kept["b"] < 650 and 550 < kept["e"] < 650
    assert exposure(1, tag_dropout=1.0, keep_tags=2) == "a, b"
    assert exposure(1, trigger="zumi", tag_dropout=1.0, keep_tags=0) == "zumi"
    assert exposure(1, "a,b , c", tag_dropout=0.0) == "a,b , c"
    # Another tag changes nothing for those that are there.
    fewer, more = (exposures(caption, tag_dropout=0.5) for caption in ("a, b, c", "a, new, b, c"))
    assert [text.replace(", new", "") for text in more] == fewer


def test_dropped_tags_are_shuffled_with_the_rest() -> None:
    found = exposures("a, b, c", tag_dropout=0.5, shuffle_tags=True)
    assert set(found) == {"a", "a, b", "a, c", "a, b, c", "a, c, b"}


def test_separator_keeps_tags_in_front_and_at_the_end() -> None:
    found = exposures("a, b ||| c, d ||| e", keep_separator="|||", shuffle_tags=True, keep_tags=0)
    assert set(found) == {"a, b, c, d, e", "a, b, d, c, e"}
    assert set(exposures("a ||| b, c", keep_separator="|||", tag_dropout=1.0)) == {"a"}
    assert set(exposures("a ||| b", trigger="zumi", keep_separator="|||", tag_dropout=1.0)) == {"zumi, a"}
    assert set(exposures("a, b ||| c", keep_separator="|||")) == {"a, b, c"}
    assert fixed("a, b ||| c ||| d", keep_separator="|||") == ["a, b, c, d"]
    # Without one, as many tags as ever stay in front.
    assert set(exposures("a, b, c", keep_separator="|||", shuffle_tags=True)) == {"a, b, c", "a, c, b"}
    assert exposure(1, "a ||| b") == "a ||| b"


def test_prefix_and_suffix_frame_every_caption() -> None:
    frame = {"caption_prefix": "best quality,", "caption_suffix": ", white background"}
    assert exposure(1, "a cat", **frame) == fixed("a cat", **frame)[0] == "best quality, a cat, white background"
    assert exposure(1, "a cat", "zumi", **frame) == "best quality, zumi, a cat, white background"
    assert exposure(1, "a cat", caption_prefix="a photo of ", caption_suffix="at night") == "a photo of a cat at night"
    assert exposure(1, "a cat", "zumi", caption_prefix="zumi style,") == "zumi style, a cat"
    assert set(exposures("a, b", tag_dropout=1.0, **frame)) == {"best quality, a, white background"}
    assert exposure(1, "a cat", caption_dropout=1.0, **frame) == ""


def test_every_line_is_used_equally_often() -> None:
    caption = "one\n\n two \nthree"
    found = exposures(caption, 300, caption_lines=True)
    assert all(sorted(found[first : first + 3]) == ["one", "three", "two"] for first in range(0, 300, 3))
    assert len({tuple(found[first : first + 3]) for first in range(0, 300, 3)}) == 6
    assert fixed(caption, "zumi", caption_lines=True) == ["zumi, one", "zumi, two", "zumi, three"]
    assert exposure(1, caption) == caption
    assert exposure(1, "", "zumi", caption_lines=True) == "zumi"
    assert lacks_trigger("a zumi\na cat", CaptionOptions(caption_lines=True), "zumi")
    assert not lacks_trigger("a zumi\na cat", CaptionOptions(), "zumi")
    assert not lacks_trigger("a cat", CaptionOptions(caption_prefix="zumi"), "zumi")


def test_wildcards_are_drawn_at_every_exposure() -> None:
    found = Counter(exposures("a {red|blue} {cat|dog}", 1000, wildcards=True))
    assert set(found) == {"a red cat", "a red dog", "a blue cat", "a blue dog"}
    assert all(200 < number < 300 for number in found.values())
    assert set(exposures("{a|b{c|d}} {e}", wildcards=True)) == {"a {e}", "bc {e}", "bd {e}"}
    assert set(exposures("a{| big} cat", wildcards=True)) == {"a cat", "a big cat"}
    assert fixed("a {red|{x|y}} {cat|dog}", wildcards=True) == ["a red cat"]
    assert exposure(1, "a {red|blue}") == "a {red|blue}"


def test_class_word_replaces_the_trigger_in_prior_captions() -> None:
    def drawn(caption: str, number: int) -> str:
        return prior_caption(
            caption, trigger="zumi", class_words=["cat", "red \\1 dog"], seed=0, example="x.png", exposure=number
        )

    found = [drawn("a big Zumi, zumis", number) for number in range(100)]
    assert set(found) == {"", "a big cat, zumis", "a big red \\1 dog, zumis"}
    assert 35 < found.count("") < 65
    assert 950 < [drawn("zumi", number) for number in range(2000)].count("") < 1050, "half of them are empty"
    assert 10 < found.count("a big cat, zumis") < 40
    assert drawn("", 1) == ""


def test_captions_that_are_no_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.txt").mkdir()
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "of no image.txt").mkdir()
    found = read_captions(tmp_path, ["a.png", "b.png", "c.png"])
    assert [source for source, _ in found.faults] == ["a.txt", "b.txt", "c.txt"]
    assert all(
        kind in message for (_, message), kind in zip(found.faults, ("dead link", "folder", "regular"), strict=True)
    )


def test_caption_that_is_a_link_out_of_the_folder_is_refused_but_beside_its_image(tmp_path: Path) -> None:
    folder, store = tmp_path / "set", tmp_path / "store"
    for place in (folder, store, tmp_path / "other"):
        place.mkdir()
    (tmp_path / "other" / "secret").write_text("root:x")
    for name in ("a.png", "b.png", "b.txt", "list"):
        (store / name).write_text(f"text of {name}")
    (folder / "a.png").symlink_to(store / "a.png")
    (folder / "a.txt").symlink_to(tmp_path / "other" / "secret")
    (folder / "b.png").symlink_to(store / "b.png")
    (folder / "b.txt").symlink_to(store / "b.txt")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "other" / "secret")
    (folder / "c.png").write_text("")
    (folder / "inside").write_text("a ball")
    (folder / "c.txt").symlink_to("inside")
    found = read_captions(folder, ["a.png", "b.png", "c.png"])
    assert found.by_image == {"a.png": {"a.txt": ""}, "b.png": {"b.txt": "text of b.txt"}, "c.png": {"c.txt": "a ball"}}
    assert [source for source, message in found.faults if "outside of the folder" in message] == [
        "metadata.jsonl", "a.txt",
    ]  # fmt: skip


def test_captions_are_bounded_before_they_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 20) + b"x")
    with pytest.raises(DataError, match=r"a\.txt: larger than 1 MiB"):
        caption_in(tmp_path / "a.txt", "a.txt")
    file = tmp_path / "metadata.jsonl"
    with file.open("wb") as handle:
        handle.truncate(60_000_000)
    captions, faults = read_metadata(file)
    assert captions == {} and "metadata.jsonl: larger than 50 MiB" in faults[0]
    file.write_bytes(b"\n" * 200_001)
    assert "at most 200,000" in read_metadata(file)[1][0]
    file.write_bytes(b"x\n" * 1000 + b'{"file_name": "a.png", "text": "a ball"}\n')
    captions, faults = read_metadata(file)
    assert (captions, len(faults)) == ({}, 21)
    assert "stopped before line 21" in faults[-1]
