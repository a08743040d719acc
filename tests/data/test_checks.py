import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from sdlora.common.bundled import ImageFolder, resolve_data_folder
from sdlora.data.checks import Checkup, Finding, examine, summarize_warnings
from sdlora.data.dataset import load_dataset
from sdlora.errors import DataError
from sdlora.pocket.world import random_scene, render


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Write an image of the world, captioned unless told otherwise."""

    def write(name: str, scene: int = 0, caption: str | None = "a zumi", mirrored: bool = False) -> None:
        image = render(random_scene(scene))
        (ImageOps.mirror(image) if mirrored else image).save(tmp_path / name)
        if caption is not None:
            (tmp_path / name).with_suffix(".txt").write_text(caption, encoding="utf-8")

    return write


def check(folder: Path, trigger: str | None = None) -> Checkup:
    return examine(folder, background="white", trigger=trigger)


def only(folder: Path, kind: str, trigger: str | None = None) -> Finding:
    """The one finding, which is of this kind."""
    (found,) = check(folder, trigger).findings
    assert found.kind == kind
    return found


def test_valid_folder_has_no_findings(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    put("b.png", 2)
    checkup = check(tmp_path, trigger="zumi")
    assert (checkup.num_files, checkup.findings) == (2, ())
    assert [(p.path.name, p.caption, p.size) for p in checkup.images] == [
        ("a.png", "a zumi", (64, 64)), ("b.png", "a zumi", (64, 64)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["zumi", "blueprint"])
def test_bundled_sets_have_no_findings(name: str) -> None:
    assert check(resolve_data_folder(f"builtin:{name}"), trigger=name).findings == ()
    assert check(resolve_data_folder(f"builtin:{name}/holdout"), trigger=name).findings == ()


def test_truncated_file_is_an_error(tmp_path: Path, put: Callable[..., None]) -> None:
    put("cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    found = only(tmp_path, "unreadable")
    assert (found.severity, found.files) == ("error", ("cut.png",))
    assert "cut.png: broken or truncated" in found.message
    assert check(tmp_path).num_files == 1
    assert check(tmp_path).images == ()


def test_file_with_unsupported_pixels_is_an_error(tmp_path: Path, put: Callable[..., None]) -> None:
    put("deep.tif")
    Image.new("F", (8, 8)).save(tmp_path / "deep.tif")
    assert "deep.tif: floating-point" in only(tmp_path, "unreadable").message


def test_missing_captions_are_one_error(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    put("b.png", 2, caption=None)
    put("c.png", 3, caption=" ")
    found = only(tmp_path, "no caption")
    assert (found.severity, found.files) == ("error", ("b.png", "c.png"))
    assert "2 of 3 images have no caption: b.png, c.png." in found.message


def test_unreadable_caption_is_not_reported_as_missing(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    found = only(tmp_path, "caption")
    assert (found.severity, found.files) == ("error", ("a.txt",))
    assert "UTF-8" in found.message
    put("a.png", 1, caption=None)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text("{\n[]\n")
    first, second = check(tmp_path).findings
    assert first.files == second.files == ("metadata.jsonl",)
    assert ("line 1" in first.message, "line 2" in second.message) == (True, True)


def test_two_different_captions_are_an_error(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "another"}))
    found = only(tmp_path, "caption")
    assert (found.severity, found.files) == ("error", ("a.png",))
    assert "a.txt and metadata.jsonl" in found.message
    (tmp_path / "metadata.jsonl").unlink()
    for suffix in ("caption", "json"):
        (tmp_path / f"a.{suffix}").write_text(f'"{suffix}"')
    assert "a.png: a.caption, a.json and a.txt give different captions" in only(tmp_path, "caption").message
    for name in ("a.caption", "a.txt"):
        (tmp_path / name).write_text("json")
    assert check(tmp_path).findings == ()
    assert check(tmp_path).images[0].caption == "json"


def test_names_in_any_case_and_jpegs_by_any_name_are_read(tmp_path: Path) -> None:
    for number, name in enumerate(["A.PNG", "b.jfif", "C.JPE"]):
        format_ = "PNG" if name.endswith("PNG") else "JPEG"
        render(random_scene(number)).save(tmp_path / name, format=format_)
    for name in ("a.TXT", "B.Caption", "C.txt"):
        (tmp_path / name).write_text(name)
    checkup = check(tmp_path)
    assert checkup.findings == ()
    found = {image.name: image.caption for image in checkup.images}
    assert found == {"A.PNG": "a.TXT", "b.jfif": "B.Caption", "C.JPE": "C.txt"}


def test_folder_of_subfolders_says_which_hold_images(tmp_path: Path, put: Callable[..., None]) -> None:
    for name in ("one", "two/deep", "empty", ".hidden", "holdout"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("one/a.png", "one/b.png", "two/deep/c.png", ".hidden/d.png", "holdout/e.png"):
        put(name)
    with pytest.raises(DataError) as caught:
        check(tmp_path)
    assert "subfolders do: one (2), two/deep (1). " in str(caught.value)
    assert all(way in str(caught.value) for way in ("data.recursive = true", "data.sets", "10_zumi"))


def test_images_of_subfolders_have_relative_names(tmp_path: Path, put: Callable[..., None]) -> None:
    for number, name in enumerate(["a.png", "x/a.png", "x/y/a.png", "holdout/b.png", ".cache/b.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        put(name, number, caption=f"in {name}")
    put("x/b.png", 0, caption=None)
    (tmp_path / "x/loop").symlink_to(tmp_path)
    checkup = examine(tmp_path, background="white", recursive=True)
    found = [(image.name, image.caption) for image in checkup.images]
    assert found == [
        ("a.png", "in a.png"), ("x/a.png", "in x/a.png"), ("x/b.png", None), ("x/y/a.png", "in x/y/a.png"),
    ]  # fmt: skip
    assert [(finding.kind, finding.files) for finding in checkup.findings] == [
        ("no caption", ("x/b.png",)), ("duplicate", ("a.png", "x/b.png")),
    ]  # fmt: skip
    Image.new("L", (64, 64)).save(tmp_path / "x/a-mask.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "a-mask.png")
    checkup = examine(tmp_path, background="white", caption="x", recursive=True, masks="file")
    (fault,) = (finding for finding in checkup.findings if finding.kind == "mask")
    assert fault.files == ("x/a-mask.png",) and "x/a.png" in fault.message
    masks = {image.name: image.mask for image in checkup.images if image.mask}
    assert masks == {"a.png": tmp_path / "a-mask.png", "x/a.png": tmp_path / "x/a-mask.png"}


def test_excluded_images_are_left_out_with_what_is_wrong_with_them(tmp_path: Path, put: Callable[..., None]) -> None:
    (tmp_path / "x").mkdir()
    for number, name in enumerate(("a.png", "b.png", "x/c.png")):
        put(name, number, caption=f"in {name}")
    (tmp_path / "b.json").write_text("3")  # no caption
    (tmp_path / "broken.png").write_bytes(b"")
    put("b-mask.png", 3, caption=None)
    left_out = ["b.png", "broken.png", "x/c.png"]
    checkup = examine(tmp_path, background="white", recursive=True, exclude=left_out)
    assert ([image.name for image in checkup.images], checkup.num_files, checkup.findings) == (["a.png"], 1, ())
    checkup = examine(tmp_path, background="white", recursive=True, exclude=[*left_out, "gone.png"])
    assert [(finding.kind, finding.files) for finding in checkup.findings] == [("unused exclude", ("gone.png",))]
    with pytest.raises(DataError, match=r"data\.exclude"):
        examine(tmp_path, background="white", exclude=["a.png", *left_out])


def test_duplicates_and_near_duplicates_are_warnings(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    put("b.bmp", 1)  # other bytes, the same pixels
    put("c.png", 2)
    put("d.png", 1, mirrored=True)
    same, near = check(tmp_path).findings
    assert (same.kind, same.severity, same.files) == ("duplicate", "warning", ("a.png", "b.bmp"))
    assert "a.png and b.bmp" in same.message
    assert (near.kind, near.severity, near.files) == ("near-duplicate", "warning", ("a.png", "d.png"))
    assert "a.png and d.png" in near.message


def test_captions_without_the_trigger_are_a_warning(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1, caption="a big Zumi")
    put("b.png", 2, caption="a zumiish thing")
    found = only(tmp_path, "no trigger", trigger="zumi")
    assert (found.severity, found.files) == ("warning", ("b.png",))
    assert all(fact in found.message for fact in ("1 of 2", "'zumi'", "b.png"))
    assert check(tmp_path).findings == ()


def test_ignored_subfolders_and_captions_are_warnings(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "lonely.txt").write_text("x")
    subfolder, unused = check(tmp_path).findings
    assert (subfolder.kind, subfolder.files) == ("subfolder", ("more",))
    assert (unused.kind, unused.files) == ("unused caption", ("lonely.txt",))


def test_hidden_files_are_no_images_and_no_captions(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    for name in ("._a.png", ".trashed-1-a.png", "._a.txt", "._metadata.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    found = check(tmp_path)
    assert found.num_files == 1 and not [f for f in found.findings if "._" in f.message or ".trashed" in f.message]


def test_what_is_left_out_is_told(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", 1)
    (tmp_path / "b.PNG").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "c.psd").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jp2").touch()
    found = {f.kind: (f.files, f.severity) for f in check(tmp_path).findings}
    assert found["dead link"] == (("b.PNG",), "warning") and found["other format"] == (("c.psd",), "warning")
    deep = examine(tmp_path, background="white", recursive=True).findings
    assert next(f.files for f in deep if f.kind == "other format") == ("c.psd", "d.jp2")


def test_warnings_are_summarized_by_kind(tmp_path: Path, put: Callable[..., None]) -> None:
    for number, name in enumerate("abc"):
        put(f"{name}1.png", number)
        put(f"{name}2.png", number, mirrored=True)
    expected = ["3 near-duplicate pairs: a1.png and a2.png, b1.png and b2.png, c1.png and c2.png; keep one of each."]
    assert summarize_warnings(check(tmp_path).findings) == expected
    put("a3.bmp", 0)
    put("b3.bmp", 1)
    put("b4.bmp", 1)
    assert summarize_warnings(check(tmp_path).findings)[0] == (
        "2 duplicate groups: a1.png and a3.bmp, b1.png and b3.bmp and b4.bmp; keep one of each."
    )


def test_loading_raises_all_errors_of_the_check(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a.png", caption=None)
    (tmp_path / "b.png").write_bytes(b"")
    errors = [finding.message for finding in check(tmp_path).findings]
    assert len(errors) == 2
    with pytest.raises(DataError) as caught:
        load_dataset(ImageFolder(str(tmp_path)))
    assert str(caught.value).splitlines()[1:] == [f"  {message}" for message in errors]
