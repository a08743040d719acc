import base64
import io
import re

import pytest
from PIL import Image

from sdlora.report.images import LONGEST_PX, Album


def decoded(element: str) -> Image.Image:
    (data,) = re.findall(r"src='data:image/(?:png|jpeg);base64,([^']+)'", element)
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_image_is_embedded_once_and_read_once() -> None:
    album, read = Album(), []

    def sprite() -> Image.Image:
        read.append(True)
        return Image.new("RGB", (8, 8), "red")

    first, again = album.show("x", sprite, "<x>'s"), album.show("x", sprite, "again")
    other = album.show("y", sprite, "y")
    assert len(read) == 2
    assert "src=" not in again
    (identity,) = re.findall(r" id='([^']+)'", first)
    assert f"data-same='{identity}'" in again and f"id='{identity}'" not in other
    assert "alt='&lt;x&gt;&#x27;s'" in first


def test_sprites_stay_exact_and_large_images_become_small() -> None:
    sprite = Image.effect_noise((64, 48), 90).convert("RGB")
    shown = Album().show("s", lambda: sprite, "s")
    assert decoded(shown).convert("RGB").tobytes() == sprite.tobytes()
    assert "class='crisp'" in shown and "width='64' height='48'" in shown
    large = Album().show("l", lambda: Image.effect_noise((1024, 512), 40), "l")
    assert (decoded(large).format, decoded(large).size) == ("JPEG", (LONGEST_PX, LONGEST_PX // 2))
    assert "crisp" not in large


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_mode_is_shown(mode: str) -> None:
    assert decoded(Album().show("m", lambda: Image.new(mode, (8, 8)), "m")).mode == "RGB"


def test_the_image_given_is_left_as_it_was() -> None:
    large = Image.new("RGB", (1024, 512))
    Album().show("l", lambda: large, "l")
    assert large.size == (1024, 512)
