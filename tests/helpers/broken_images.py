"""Images that are none, or that would take too much: each is to be refused by name."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sdlora.data.images import load_image
from sdlora.errors import DataError

SIZE = (64, 48)
PNG_MARK = b"\x89PNG\r\n\x1a\n"


def noise(size: tuple[int, int] = SIZE, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    content = io.BytesIO()
    (image or noise()).save(content, format=kind, **options)
    return content.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, color: int = 2) -> bytes:
    """A PNG of these chunks between its header and its end."""
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return PNG_MARK + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def flipped(content: bytes, place: float) -> bytes:
    at = int(len(content) * place)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *(0,) * 6)


def tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width * height}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value & 0xFFFFFFFF) for tag, value in sorted(tags.items()))
    return b"II*\x00" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def jpeg(width: int, height: int) -> bytes:
    """A real JPEG whose header tells another size."""
    content = encoded("JPEG", quality=90)
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def corrupt() -> dict[str, bytes]:
    """Files by name; none of them is an image that may be trained."""
    whole = {suffix: encoded(kind) for suffix, kind in KINDS.items()}
    files = {f"half.{suffix}": content[: len(content) // 2] for suffix, content in whole.items()}
    files |= {f"head.{suffix}": content[:24] for suffix, content in whole.items()}
    # Of the five only PNG has sums to check; elsewhere the decoder must stumble.
    files |= {f"flipped{i}.png": flipped(whole["png"], place) for i, place in enumerate((0.004, 0.02, 0.3, 0.6, 0.9))}
    bomb = zlib.compress(bytes(200_000_000))
    row = zlib.compress(b"".join(b"\x00" + bytes(12) for _ in range(4)))
    frames = [noise(), noise().rotate(180)]
    film: dict[str, object] = {"save_all": True, "append_images": frames[1:]}
    return files | {
        "empty.png": b"",
        "page.jpg": b"<!doctype html><html><body><script>alert(1)</script></body></html>",
        "words.png": b"not an image at all\n" * 100,
        "nothing.bmp": bytes(1_000_000),
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "print.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\nshowpage\n%%EOF\n",
        "paper.jpg": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
        "still.gif": encoded("GIF"),
        "icon.png": encoded("ICO"),
        "plain.png": encoded("PPM"),
        "film.webp": encoded("WEBP", frames[0], **film),
        "film.png": encoded("PNG", frames[0], **film),
        "pages.tif": encoded("TIFF", frames[0], **film),
        "floats.tif": encoded("TIFF", Image.new("F", (4, 4))),
        "packed.png": b"PK\x03\x04" + bytes(200),
        "profile-bomb.png": png(4, 4, chunk(b"iCCP", b"a\x00\x00" + bomb)),
        "12k.png": png(12_000, 12_000, chunk(b"IDAT", row)),
        "60k.png": png(60_000, 60_000, chunk(b"IDAT", row)),
        "below-the-cap.png": png(12_000, 8_000, chunk(b"IDAT", row)),
        "long.png": png(6, 16_000_000, chunk(b"IDAT", row)),
        "60k.jpg": jpeg(60_000, 60_000),
        "60k.bmp": bmp(60_000, 60_000),
        "60k.tif": tiff(60_000, 60_000),
        "no-size.png": png(0, 0, chunk(b"IDAT", row)),
        "no-pixels.png": png(4, 4),
        "no-palette.png": png(4, 4, chunk(b"IDAT", zlib.compress(b"\x00" * 20))[:10], color=3),
        "no-scan.jpg": encoded("JPEG")[: encoded("JPEG").index(b"\xff\xda")],
        "wrong-size.webp": encoded("WEBP")[:4] + struct.pack("<I", 12) + encoded("WEBP")[8:],
    }  # fmt: skip


def beside_pixels() -> dict[str, bytes]:
    """PNGs of 4 x 4 black pixels with texts that fill the memory, by name; the pixels may be trained."""
    bomb = zlib.compress(bytes(200_000_000))
    row = zlib.compress(b"".join(b"\x00" + bytes(12) for _ in range(4)))
    return {
        "text-bomb.png": png(4, 4, chunk(b"zTXt", b"a\x00\x00" + bomb), chunk(b"IDAT", row)),
        "long-text-bomb.png": png(4, 4, chunk(b"iTXt", b"a\x00\x01\x00\x00\x00" + bomb), chunk(b"IDAT", row)),
    }


KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}


def decode_all(folder: Path, report: Path) -> None:
    """Write what becomes of every file, and by how many MB the memory in use rose at most."""
    load_image(next(folder.glob("*.ok.png")), "white")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = []
    for file in sorted(folder.iterdir()):
        try:
            found = f"{load_image(file, 'white').size}"
        except DataError as error:
            found = f"refused: {error}"
        lines.append(f"{file.name}\t{' '.join(found.split())}")
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    report.write_text("\n".join([*lines, str(rise)]), encoding="utf-8")
