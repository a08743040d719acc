import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from sdlora.report.html import Attributes
from sdlora.report.images import LONGEST_PX, Album, read_image


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
