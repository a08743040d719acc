"""What training reads of images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from helpers.trainer import make_trainer
from PIL import Image

from sdlora.common.bundled import CaptionOptions
from sdlora.config.schema import PreviewConfig
from sdlora.config.toml import parse_config
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Dataset
from sdlora.run.arguments import training_settings
from sdlora.run.setup import preview_request
from sdlora.training.data import evaluation_data, training_data


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


def test_evaluation_reads_one_form_of_every_caption_and_training_another_at_every_exposure(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path / "cache")
    options = CaptionOptions(
        wildcards=True, caption_lines=True, tag_dropout=0.5, shuffle_tags=True, keep_separator="|||",
        caption_prefix="best,", caption_dropout=0.2,
    )  # fmt: skip
    example = replace(
        trainer.data.dataset.examples[0], caption="a {red|blue} ball ||| b, c\nanother, d", trigger="zumi",
        captions=options,
    )  # fmt: skip
    dataset = Dataset((example,), ())
    evaluated = evaluation_data(dataset, trainer.data.cache, text_is_trained=False)
    seen = [Exposure(0, number) for number in range(1, 400)]
    assert evaluated.captions(seen) == ["best, zumi, a red ball, b, c"]
    settings = training_settings(parse_config({"data": {"folder": "x"}}, name="n"))
    trained = training_data(settings, dataset, trainer.data.cache)
    assert set(trained.captions(seen)) == {
        "",
        *(f"best, zumi, a {c} ball{rest}" for c in ("red", "blue") for rest in ("", ", b", ", c", ", b, c", ", c, b")),
        *(f"best, zumi{rest}" for rest in ("", ", another", ", d", ", another, d", ", d, another")),
    }
    assert preview_request(PreviewConfig(num_captions=1), dataset).prompts[0] == "best, zumi, a red ball, b, c"
