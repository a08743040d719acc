"""What all importers share: lengths, folders, optimizers, schedules, resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdlora.config.imports.rules import Outcome, Source, Status
from sdlora.config.imports.shared import (
    VAE,
    Length,
    TrainingFolder,
    base_path,
    count_images,
    data_options,
    file_precision,
    num_steps,
    optimizer,
    optimizer_argument,
    precision,
    resolution,
    schedule,
    spread,
    spread_steps,
    warmup,
)


def test_images_are_counted_as_training_counts_them(folder: Path) -> None:
    (folder / "photos" / "notes.txt").touch()
    (folder / "photos" / "UPPER.JPG").touch()
    (folder / "photos" / "0-mask.png").touch()
    assert count_images("photos") == 5
    assert count_images("photos", recursive=True) == 9
    assert count_images("nowhere") is None
    assert count_images("nul\0") is None


@pytest.mark.parametrize(
    ("epochs", "repeats", "expected_epochs", "expected_repeats"),
    [
        (10, [10], 5, [20]),
        (5, [10], 5, [10]),
        (1, [100], 1, [100]),
        (8, [10], 5, [16]),
        (6, [2], 4, [3]),
        (10, [5, 10], 5, [10, 20]),
        (100, [1], 5, [20]),
        (12, [1], 4, [3]),
        (9, [1], 3, [3]),
        (2.5, [2], 5, [1]),
        (2, [1.5], 3, [1]),
        (0.5, [1], 1, [1]),
    ],
)
def test_exposures_stay_the_same(
    epochs: float, repeats: list[float], expected_epochs: int, expected_repeats: list[int]
) -> None:
    found = spread(epochs, repeats)
    assert (found.epochs, found.repeats) == (expected_epochs, expected_repeats)
    changed = (found.epochs, found.repeats) != (epochs, repeats)
    assert bool(found.remark) is changed
    if epochs * repeats[0] >= 1:
        assert found.epochs * found.repeats[0] == epochs * repeats[0]


@pytest.mark.parametrize("exposures", range(1, 400))
def test_any_number_of_exposures_is_met_within_a_tenth(exposures: int) -> None:
    found = spread(exposures, [1])
    assert 1 <= found.epochs <= 5
    assert abs(found.epochs * found.repeats[0] / exposures - 1) <= (0.1 if exposures > 10 else 0.15)


def test_the_cap_is_said_with_the_exposures() -> None:
    remark = spread(10, [10]).remark
    assert "stay the same (100)" in remark and "5 epochs" in remark
    assert "nearly the same (11 become 12)" in spread(11, [1]).remark


def test_steps_become_exposures_of_the_images_there_are() -> None:
    found = spread_steps(100, 4, [TrainingFolder("photos")], "100 steps")
    assert isinstance(found, Length)
    assert (found.epochs, found.repeats) == (5, [20])
    assert "100 exposures per image" in found.remark


def test_steps_keep_the_proportion_of_repeats() -> None:
    folders = [TrainingFolder("photos", 2), TrainingFolder("reg", 4)]
    found = spread_steps(40, 4, folders, "40 steps")  # 160 exposures; an epoch of 4 x 2 + 2 x 4 has 16
    assert isinstance(found, Length)
    assert (found.epochs, found.repeats) == (5, [4, 8])


@pytest.mark.parametrize("folders", [[], [TrainingFolder("nowhere")], [TrainingFolder("photos"), TrainingFolder("no")]])
def test_steps_without_images_say_what_to_set(folders: list[TrainingFolder]) -> None:
    found = spread_steps(2000, 2, folders, "2000 steps")
    assert isinstance(found, str)
    assert "4000" in found and "train.exposures" in found


def test_warmup_is_in_steps_or_a_share_of_them() -> None:
    folders, length = [TrainingFolder("photos")], Length(5, [20])
    assert num_steps(length, folders, 4) == 100
    assert warmup(100, length, folders, 4).options == {"train.warmup_steps": 100}
    assert warmup("0.05", length, folders, 4).options == {"train.warmup_steps": 5}
    assert warmup(0, "unknown", [], 4).options == {"train.warmup_steps": 0}
    assert warmup(0.05, "unknown", folders, 4).options == {"train.warmup_steps": 0.05}


def test_folders_become_one_folder_or_sets() -> None:
    one = TrainingFolder("photos/10_hero", 10, "hero", "zumi")
    assert data_options([one], None) == {
        "data.folder": "photos/10_hero", "data.repeats": 10, "data.caption": "hero", "data.trigger": "zumi",
    }  # fmt: skip
    assert data_options([one, TrainingFolder("reg")], Length(5, [20, 2])) == {
        "data.sets": [
            {"folder": "photos/10_hero", "repeats": 20, "trigger": "zumi", "caption": "hero"},
            {"folder": "reg", "repeats": 2},
        ]
    }
    twice = data_options([TrainingFolder("a/x"), TrainingFolder("b\\x\\")], None)["data.sets"]
    assert [entry["name"] for entry in twice] == ["x 1", "x 2"]


@pytest.mark.parametrize(
    ("name", "ours", "decay"),
    [
        ("AdamW", "adamw", 0.01), ("AdamW8bit", "adamw8bit", 0.01), ("PagedAdamW8bit", "adamw8bit", 0.01),
        ("ADAMW_8BIT", "adamw8bit", 0.01), ("prodigy", "prodigy", 0), ("Adafactor", "adafactor", 0),
        ("Lion", "lion", 0), ("AdamWScheduleFree", "schedule_free", 0), ("torch.optim.AdamW", "adamw", 0.01),
    ],
)  # fmt: skip
def test_optimizers(name: str, ours: str, decay: float) -> None:
    assert optimizer(name).options == {"train.optimizer": ours, "train.weight_decay": decay}
    assert optimizer(name, "0.2").options["train.weight_decay"] == 0.2


@pytest.mark.parametrize("name", ["DAdaptAdam", "CAME", "Lion8bit", "SGDNesterov", "automagic"])
def test_other_optimizers_are_refused_by_name(name: str) -> None:
    found = optimizer(name)
    assert found.status is Status.REFUSED and name in found.reason


@pytest.mark.parametrize(
    ("name", "argument", "value", "status"),
    [
        ("adamw", "betas", "0.9,0.999", Status.DROPPED),
        ("adamw", "betas", "(0.9, 0.99)", Status.REFUSED),
        ("adamw", "betas", [0.9, 0.999], Status.DROPPED),
        ("prodigy", "decouple", "True", Status.DROPPED),
        ("prodigy", "use_bias_correction", "False", Status.REFUSED),
        ("prodigy", "d_coef", "2.0", Status.REFUSED),
        ("prodigy", "growth_rate", "inf", Status.DROPPED),
        ("adafactor", "relative_step", "False", Status.DROPPED),
        ("adamw", "d_coef", "1", Status.REFUSED),
        ("came", "betas", "0.9,0.999", Status.REFUSED),
    ],
)
def test_optimizer_arguments(name: str, argument: str, value: Any, status: Status) -> None:
    assert optimizer_argument(name, argument, value).status is status


@pytest.mark.parametrize(
    ("name", "cycles", "expected"),
    [
        ("constant", None, "constant"), ("constant_with_warmup", None, "constant"), ("cosine", None, "cosine"),
        ("cosine_with_restarts", 1, "cosine"), ("cosine_with_restarts", "3", "cosine_restarts"),
        ("linear", None, "linear"),
        ("polynomial", 1, "linear"), ("rex", None, "rex"), ("piecewise_constant", None, None),
    ],
)  # fmt: skip
def test_schedules(name: str, cycles: Any, expected: str | None) -> None:
    found = schedule(name, cycles)
    assert found.options.get("train.lr_schedule") == expected
    assert (found.status is Status.REFUSED) is (expected is None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1024,1024", 1024), (1024, 1024), ("768", 768), ([512, 512], 512), ("512x512", 512), ("512,768", None),
        ([512, 768, 1024], None),
    ],
)  # fmt: skip
def test_resolutions(value: Any, expected: int | None) -> None:
    assert resolution(value).options.get("data.resolution_px") == expected


def test_a_shape_is_refused_with_the_edge_of_the_same_area() -> None:
    assert "627" in resolution("512,768").reason


@pytest.mark.parametrize(
    ("value", "expected"),
    [("no", "fp32"), ("bf16", "bf16"), ("FLOAT_16", "fp16"), ("TFLOAT_32", "fp32"), ("float8", None)],
)
def test_precisions(value: str, expected: str | None) -> None:
    assert precision(value).options.get("train.precision") == expected
    assert file_precision(value).options.get("file.precision") == expected


def test_base_models_that_cannot_be_read_are_refused() -> None:
    assert base_path("x.safetensors").options == {"base.path": "x.safetensors"}
    assert base_path("stabilityai/sdxl").options == {"base.path": "stabilityai/sdxl"}
    assert base_path("x.CKPT").status is Status.REFUSED


def test_shapes_of_schedules() -> None:
    assert schedule("cosine_with_restarts", "3").options["train.lr_cycles"] == 3
    assert schedule("polynomial", 1, power="2").options == {"train.lr_schedule": "polynomial", "train.lr_power": 2}
    assert schedule("cosine_with_min_lr", floor=0.1).options == {"train.lr_schedule": "cosine", "train.lr_floor": 0.1}


def test_vae_of_its_own_is_taken_over() -> None:
    source = Source("any", {})
    assert VAE.apply("owner/vae", source).options == {"base.vae": "owner/vae"}
    assert VAE.apply("", source).status is VAE.apply(None, source).status is Status.DROPPED
    assert VAE.apply("x.pt", source).status is Status.REFUSED


def test_outcomes_name_no_option_when_refused() -> None:
    assert all(not one.options for one in (optimizer("came"), schedule("wsd"), resolution("1,2")))
    assert isinstance(optimizer("adamw"), Outcome)
