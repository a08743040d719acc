"""Uploads: what is taken in under which name, and what is refused before anything is written."""

from __future__ import annotations

import io
import stat
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hostile import NAMES
from helpers.promises import Figure
from helpers.studios import write_image

from sdlora.config.toml import parse_config
from sdlora.data.checks import examine
from sdlora.data.dataset import load_dataset
from sdlora.errors import DataError
from sdlora.ui.state import uploads
from sdlora.ui.state.uploads import store_upload


def png(color: str = "red") -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(content, format="PNG")
    return content.getvalue()


def packed(path: Path, *entries: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


def test_images_and_captions_are_stored_together(tmp_path: Path) -> None:
    sent = [write_image(tmp_path / "in" / f"p {n}.png", color) for n, color in enumerate(("red", "blue"))]
    caption = tmp_path / "in" / "p 0.txt"
    caption.write_text("a red thing", encoding="utf-8")
    intake = store_upload([(file.name, file) for file in (*sent, caption)], tmp_path / "set")
    assert (intake.images, intake.num_captions, intake.refused) == (("p 0.png", "p 1.png"), 1, ())
    found = examine(tmp_path / "set", background="white").images
    assert [(image.path.name, image.caption) for image in found] == [
        ("p 0.png", "a red thing"),
        ("p 1.png", None),
    ]
    assert (tmp_path / "set" / "p 0.png").read_bytes() == sent[0].read_bytes()


def test_captions_in_other_files_are_stored_as_they_are(tmp_path: Path) -> None:
    file = packed(
        tmp_path / "z.zip", ("A.PNG", png()), ("A.Caption", b"a red thing"), ("b.png", png("blue")),
        ("b.json", b'{"tags": ["blue", "thing"]}'), ("c.json", b"{"), ("d.heic", b"x"),
    )  # fmt: skip
    intake = store_upload([("z.zip", file)], tmp_path / "set")
    assert (intake.images, intake.num_captions) == (("A.png", "b.png"), 2)
    assert [refused.split(":")[0] for refused in intake.refused] == ["c.json", "d.heic"]
    found = examine(tmp_path / "set", background="white")
    assert [image.caption for image in found.images] == ["a red thing", "blue, thing"]


def test_kohya_folders_keep_repeats_class_captions_and_what_is_preserved(tmp_path: Path) -> None:
    file = packed(
        tmp_path / "z.zip", ("top/img/10_zumi cat/a.png", png()), ("top/img/10_zumi cat/a.caption", b"a red thing"),
        ("top/img/5_style/a.png", png("blue")), ("top/reg/1_cat/b.png", png("green")), ("top/c.png", png("white")),
    )  # fmt: skip
    intake = store_upload([("z.zip", file)], tmp_path / "set")
    assert intake.images == ("10_zumi cat/a.png", "5_style/a.png", "reg/1_cat/b.png") and intake.num_captions == 1
    assert ["c.png" in reason for reason in intake.refused] == [True], "it would hide the folders"
    data = parse_config({"data": {"folder": str(tmp_path / "set")}}, name="x").data
    assert [(one.name, one.repeats, one.caption) for one in data.sets] == [
        ("10_zumi cat", 10, "zumi cat"), ("5_style", 5, "style"),
    ]  # fmt: skip
    assert data.preservation_folder == str(tmp_path / "set" / "reg" / "1_cat")
    assert [example.caption for example in load_dataset(*data.sets).examples] == ["a red thing", "style"]
    again = store_upload([("z.zip", file)], tmp_path / "set")
    assert again.images[0] == "10_zumi cat/a-2.png"
    assert (tmp_path / "set" / "10_zumi cat" / "a-2.caption").read_bytes() == b"a red thing"


def test_kohya_folders_and_single_images_are_not_mixed(tmp_path: Path) -> None:
    folders = packed(tmp_path / "z.zip", ("10_zumi/a.png", png()))
    single = write_image(tmp_path / "in" / "b.png", "blue")
    store_upload([("z.zip", folders)], tmp_path / "set")
    with pytest.raises(DataError, match="10_zumi"):
        store_upload([("b.png", single)], tmp_path / "set")
    store_upload([("b.png", single)], tmp_path / "other")
    with pytest.raises(DataError, match="new set"):
        store_upload([("z.zip", folders)], tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["b.png"]


def test_taken_name_gets_a_number_like_its_caption(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_image(folder / "a.png", "red")
    (folder / "a.txt").write_text("old", encoding="utf-8")
    file = packed(
        tmp_path / "z.zip",
        ("x/a.png", png("blue")),
        ("x/a.txt", b"blue"),
        ("y/a.png", png("green")),
        ("y/a.txt", b"green"),
    )
    assert store_upload([("z.zip", file)], folder).images == ("a-2.png", "a-3.png")
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    assert texts == {"a.txt": "old", "a-2.txt": "blue", "a-3.txt": "green"}
    late = tmp_path / "a-3.txt"
    late.write_text("very green", encoding="utf-8")
    store_upload([("a-3.txt", late)], folder)
    assert (folder / "a-3.txt").read_text(encoding="utf-8") == "very green"


def test_metadata_file_becomes_caption_files(tmp_path: Path) -> None:
    lines = b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    file = packed(tmp_path / "z.zip", ("a.png", png()), ("b.png", png("blue")), ("metadata.jsonl", lines))
    store_upload([("z.zip", file)], tmp_path / "set")
    assert (tmp_path / "set" / "b.txt").read_text(encoding="utf-8") == "two"
    assert not (tmp_path / "set" / "metadata.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"<html><script>alert(1)</script>"), ("a.jpg", b""), ("a.png", png()[:60]), ("a.svg", b"<svg/>"),
        ("a.html", b"<p>"), ("a.exe", b"MZ"), ("a.txt", b"\xff\xfe\x00"), (".bashrc", b"x"), ("a.gif", b"GIF89a"),
    ],
)  # fmt: skip
def test_other_file_is_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "sent"
    file.write_bytes(content)
    intake = store_upload([(name, file)], tmp_path / "set")
    assert intake.images == () and len(intake.refused) == 1
    assert name.lstrip(".") in intake.refused[0] and "partial" not in intake.refused[0]
    assert not (tmp_path / "set").exists(), "no empty set is left behind"


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_stay_within_the_set(name: str, tmp_path: Path) -> None:
    file = write_image(tmp_path / "sent.png")
    intake = store_upload([(f"{name}.png", file)], tmp_path / "root" / "set")
    assert len(intake.images) == 1
    assert [path.name for path in (tmp_path / "root").rglob("*") if path.is_file()] == list(intake.images)


def bomb(path: Path) -> Path:
    return packed(path, ("a.png", b"\0" * (30 * 2**20)))


HOSTILE_ZIPS: dict[str, Callable[[Path], Path]] = {
    "leads out": lambda p: packed(p, ("a.png", png()), ("../../evil.png", png())),
    "leads out twice": lambda p: packed(p, ("x/../../evil.png", png())),
    "names a place": lambda p: packed(p, ("/etc/evil.png", png())),
    "names a drive": lambda p: packed(p, ("C:evil.png", png())),
    "backslash": lambda p: packed(p, ("..\\evil.png", png())),
    "device": lambda p: packed(p, ("con.png", png())),
    "device folder": lambda p: packed(p, ("aux/evil.png", png())),
    "link": lambda p: packed(p, ("evil.png", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777),
    "nested": lambda p: packed(p, ("inner.zip", packed(p.with_suffix(".in"), ("a.png", png())).read_bytes())),
    "bomb": bomb,
    "many": lambda p: packed(p, *((f"{n}.png", b"") for n in range(uploads.MOST_FILES + 1))),
    "no zip": lambda p: p.write_bytes(b"PK\x03\x04nothing") and p,  # type: ignore[dict-item,return-value]
}


def test_hostile_zips_are_refused_whole(tmp_path: Path, figure: Figure) -> None:
    assert len(HOSTILE_ZIPS) >= 12
    for kind, make in HOSTILE_ZIPS.items():
        root = tmp_path / kind
        root.mkdir()
        file = make(root / "z.zip")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DataError, match=r"z\.zip"):
            store_upload([("z.zip", file)], root / "set")
        assert sorted(tmp_path.rglob("*")) == before, kind
    figure("Uploads", f"{len(HOSTILE_ZIPS)} of {len(HOSTILE_ZIPS)} refused, nothing written")


def test_zip_with_wrong_size_is_refused(tmp_path: Path) -> None:
    file = packed(tmp_path / "z.zip", ("a.png", png() + b"\0" * 5000))
    content = bytearray(file.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = (10).to_bytes(4, "little")
    file.write_bytes(bytes(content))
    intake = store_upload([("z.zip", file)], tmp_path / "set")
    assert intake.images == () and len(intake.refused) == 1


def test_oversized_upload_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_image(tmp_path / "a.png")
    monkeypatch.setattr(uploads, "MOST_BYTES_IN_ALL", 10)
    with pytest.raises(DataError, match="limit is 0 KiB"):
        store_upload([("a.png", file)], tmp_path / "set")
    monkeypatch.setattr(uploads, "MOST_BYTES_IN_ALL", 10**9)
    with pytest.raises(DataError, match="2001 files"):
        store_upload([("a.png", file)] * 2001, tmp_path / "set")
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    assert "larger" in store_upload([("a.png", file)], tmp_path / "set").refused[0]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda whole: whole[20:], "broken"),
        (lambda whole: whole.replace(b"a.png", b"\0.png"), "has no name"),
    ],
)
def test_zip_with_wrong_entries_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes], told: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"not read")
    (tmp_path / "x.zip").write_bytes(spoil((tmp_path / "x.zip").read_bytes()))
    try:
        refused = store_upload([("x.zip", tmp_path / "x.zip")], tmp_path / "set").refused
    except DataError as error:
        refused = (str(error),)
    assert told in "".join(refused)
    assert not list((tmp_path / "set").glob("*"))


def test_uploads_of_too_many_captions_are_refused_before_they_are_read(tmp_path: Path) -> None:
    many = packed(tmp_path / "many.zip", *((f"{n}.txt", b"a ball") for n in range(20_000)))
    lines = b"".join(b'{"file_name": "%d.png", "text": "x"}\n' % n for n in range(2001))
    (tmp_path / "metadata.jsonl").write_bytes(lines)
    with (tmp_path / "large.jsonl").open("wb") as handle:
        handle.truncate(60_000_000)
    listed = bytearray(packed(tmp_path / "far.zip", ("a.png", png())).read_bytes())
    listed[-10:-6] = (1 << 30).to_bytes(4, "little")  # the size of its list
    (tmp_path / "far.zip").write_bytes(listed)
    for name, file, told in (
        ("many.zip", many, "20000 files; the limit is 2000"),
        ("far.zip", tmp_path / "far.zip", "far more than 2000 files"),
        ("metadata.jsonl", tmp_path / "metadata.jsonl", "2001 captions; the limit is 2000"),
        ("metadata.jsonl", tmp_path / "large.jsonl", "larger than 50 MiB"),
    ):
        begin = time.monotonic()
        try:
            found = store_upload([(name, file)], tmp_path / "set").refused
        except DataError as error:
            found = (str(error),)
        assert told in found[0], name
        assert time.monotonic() - begin < 5
    assert not list(tmp_path.glob("set/*"))
