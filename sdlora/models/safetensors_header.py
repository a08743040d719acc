"""The header of a safetensors file: names, shapes, dtypes and metadata, and whether the file is complete.

A base model has gigabytes; its header a few hundred kilobytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sdlora.errors import BaseModelError

_MAX_HEADER_BYTES = 100 << 20
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, without its data.

    Attributes:
        shapes: By name.
        dtypes: As the file spells them, such as "F16", by name.
        starts: The offset of every tensor's data in the file, in bytes, by name.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    dtypes: dict[str, str]
    starts: dict[str, int]

    def has(self, *beginnings: str) -> bool:
        """Whether the name of any tensor starts with one of these."""
        return any(name.startswith(beginnings) for name in self.shapes)


def read_header(file: Path) -> Header:
    """Read a header and check that the file is complete.

    Raises:
        BaseModelError: The file is a pickled checkpoint, not a safetensors file, or truncated.
    """
    if file.suffix.lower() in _PICKLED:
        raise BaseModelError(
            f"{file.name} is a pickled checkpoint, which can run code when it is opened; sdlora reads only "
            ".safetensors files. Look for one on the page it came from, or convert it: in A1111, use the "
            "Checkpoint Merger tab with the format safetensors; in Python, run "
            "weights = torch.load(FILE, weights_only=True) and "
            "safetensors.torch.save_file(weights.get('state_dict', weights), NEW_FILE)."
        )
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise BaseModelError(f"{file.name} is not a safetensors file. Use a checkpoint that ends in .safetensors.")
        if length + 8 > size:
            raise _cut_off(file, size, length + 8)
        text = handle.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        starts = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{file.name} is not a safetensors file: its header cannot be read ({error}).") from error
    if 8 + length + end > size:
        raise _cut_off(file, size, 8 + length + end)
    return Header(shapes, metadata, dtypes, starts)


def _cut_off(file: Path, size: int, promised: int) -> BaseModelError:
    return BaseModelError(
        f"{file.name} is truncated: it has {size:,} bytes of at least {promised:,}. Download or copy it again."
    )
