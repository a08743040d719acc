"""What training reads of images."""

from __future__ import annotations

import shutil
from pathlib import Path

from helpers.trainer import make_trainer
from PIL import Image


def test_changed_mask_changes_the_identity_of_its_image_only(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(images, folder)
    found = [make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.5}).data.identities()]
    for width in (8, 16):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, width, 32))
        mask.save(folder / "blue-mask.png")
        found.append(make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.5}).data.identities())
    assert len({identities["blue.png"] for identities in found}) == 3
    assert len({identities["red.png"] for identities in found}) == 1
