from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from sdlora.report.html import (
    LONGEST_PX,
    Album,
    Attributes,
    Figure,
    Table,
    environment,
    epoch_name,
    one_in,
    read_image,
    render,
)


def macro(name: str, *values: Any) -> str:
    return str(getattr(environment().get_template("parts.html").module, name)(*values))


def test_page_escapes_its_title_and_forbids_requests() -> None:
    found = render("page.html", title="<b>x")
    assert "<title>&lt;b&gt;x</title>" in found and "<h1>&lt;b&gt;x</h1>" in found
    assert "default-src 'none'; img-src data:" in found
    assert found.index("<style>") < found.index("<h1>") < found.index("<script>")
    assert "http://" not in found and "https://" not in found


def test_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render("page.html")


def test_table_cells_are_escaped() -> None:
    found = macro("table", Table("<t>", ["a"], [["<1>"]]))
    assert "<th>a</th>" in found and "<td>&lt;1&gt;</td>" in found and 'aria-label="&lt;t&gt;"' in found


def test_figure_escapes_all_but_its_chart() -> None:
    found = macro("figure", Figure("<t>", Markup("<svg/>"), "a < b", {"alt": '"<x>', "class": None, "src": "data:,"}))
    assert "<h3>&lt;t&gt;</h3><svg/>" in found and "a &lt; b" in found
    assert '<img alt="&#34;&lt;x&gt;" src="data:,">' in found


def test_words_of_epochs_and_probabilities() -> None:
    assert (epoch_name(0), epoch_name(3)) == ("base", "epoch 3")
    assert (one_in(0.0027), one_in(1 / 145), one_in(0.9)) == ("About 1 in 370", "About 1 in 145", "Most")


def decoded(shown: Attributes) -> Image.Image:
    kind, data = str(shown["src"]).split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_image_is_embedded_once_and_read_once() -> None:
    album, read = Album(), []

    def sprite() -> Image.Image:
        read.append(True)
        return Image.new("RGB", (8, 8), "red")

    first, again = album.show("x", sprite, "<x>'s"), album.show("x", sprite, "again")
    other = album.show("y", sprite, "y")
    assert len(read) == 2
    assert "src" not in again and again["data-same"] == first["id"] != other["id"]
    assert (first["alt"], again["alt"]) == ("<x>'s", "again")


def test_sprites_stay_exact_and_large_images_become_small() -> None:
    sprite = Image.effect_noise((64, 48), 90).convert("RGB")
    shown = Album().show("s", lambda: sprite, "s")
    assert decoded(shown).convert("RGB").tobytes() == sprite.tobytes()
    assert (shown["class"], shown["width"], shown["height"]) == ("crisp", 64, 48)
    large = Album().show("l", lambda: Image.effect_noise((1024, 512), 40), "l")
    assert (decoded(large).format, decoded(large).size) == ("JPEG", (LONGEST_PX, LONGEST_PX // 2))
    assert large["class"] is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_is_shown(mode: str) -> None:
    assert decoded(Album().show("m", lambda: Image.new(mode, (8, 8)), "m")).mode == "RGB"


def test_given_image_is_not_changed() -> None:
    large = Image.new("RGB", (1024, 512))
    Album().show("l", lambda: large, "l")
    assert large.size == (1024, 512)


def test_read_image_closes_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "lime").save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png")
    (tmp_path / "x.png").unlink()
    assert found.getpixel((0, 0)) == (0, 255, 0)
