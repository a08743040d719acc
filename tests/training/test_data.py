"""What training reads of images."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from helpers.schedules import dataset, schedule_settings
from helpers.trainer import make_trainer
from PIL import Image, ImageOps

from sdlora.common import seeds
from sdlora.common.bundled import CaptionOptions
from sdlora.config.schema_preview import PreviewConfig
from sdlora.config.toml import parse_config
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Dataset, load_pixels
from sdlora.run.arguments import training_settings
from sdlora.run.preview_requests import preview_request
from sdlora.training.data import evaluation_data, make_schedule, training_data
from sdlora.training.loss import ExposureLoss


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


def test_flipped_images_are_mirrored_at_every_second_exposure_with_their_masks(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        image = Image.new("RGB", (32, 32), "red")
        image.paste((0, 0, 255), (0, 0, 8, 32))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a thing")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "a-mask.png")
    trainer = make_trainer(tiny_base, folder, tmp_path / "cache", loss={"mask_floor": 0.0})
    first, second = trainer.data.dataset.examples
    data = replace(trainer.data, dataset=Dataset((replace(first, flip=True), second), ()))
    exposures = [Exposure(0, 1), Exposure(0, 2), Exposure(0, 4), Exposure(1, 1), Exposure(1, 2)]
    seen = data.seen(exposures)
    assert [(example.name, example.is_mirrored) for example in seen] == [
        ("a.png", False), ("a.png", True), ("b.png", False),
    ]  # fmt: skip
    list(data.fill("white", exposures))
    plain, mirrored, _ = seen
    assert load_pixels(mirrored, "white").tobytes() == ImageOps.mirror(load_pixels(plain, "white")).tobytes()
    masks = [data.cache.mask(example) for example in seen]
    assert masks[0] is not None and masks[1] is not None
    assert torch.equal(masks[0].flip(-1), masks[1]) and not torch.equal(masks[0], masks[1])
    loss = ExposureLoss(data, trainer.settings)
    moments = data.cache.moments(seen)
    assert not torch.equal(moments[0], moments[1])
    for number, expected in ((1, 0), (2, 1), (3, 0), (4, 1)):
        latents, _ = loss.latents_and_noise([Exposure(0, number), Exposure(1, number)])
        shape, seed = latents.shape[1:], trainer.settings.seed
        noise = torch.stack([seeds.normal(shape, seed, "latent", name, number) for name in ("a.png", "b.png")])
        torch.testing.assert_close(latents, data.cache.base.sample_latents(moments[[expected, 2]], noise))
    # What is evaluated is never mirrored.
    assert torch.equal(data.moments([0])[0], moments[0])


def test_every_image_is_exposed_as_often_as_its_repeats() -> None:
    repeats = [1, 5, 2, 3, 5, 1]
    schedule = make_schedule(schedule_settings(gradient_accumulation_steps=2), dataset(repeats))
    for number, epoch in enumerate(schedule.epochs, start=1):
        met: dict[int, list[int]] = defaultdict(list)
        for step in epoch:
            assert 1 <= len(step) <= 2
            for exposure in (exposure for batch in step for exposure in batch):
                met[exposure.example].append(exposure.number)
        for index, times in enumerate(repeats):
            assert sorted(met[index]) == list(range((number - 1) * times + 1, number * times + 1))
    assert len(schedule.timesteps) == 3 * sum(repeats)


def test_exposures_of_an_image_are_spread_over_the_timesteps() -> None:
    schedule = make_schedule(schedule_settings(), dataset([1, 5, 2, 4]))
    for index, times in enumerate([1, 5, 2, 4]):
        found = sorted(t for exposure, t in schedule.timesteps.items() if exposure.example == index)
        width = 1000 / (3 * times)
        assert [int(timestep // width) for timestep in found] == list(range(3 * times))
