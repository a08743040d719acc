"""Settings as the arguments of the rooms below."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.adapters import UNET_TARGETS
from helpers.runs import digests, metrics, run, without_times
from PIL import Image

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.config.toml import parse_config
from sdlora.data.dataset import Example
from sdlora.errors import ConfigError, DataError
from sdlora.events import EpochDone, Notice, PlanMade, StepDone
from sdlora.lora.inject import target_of
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.read import read_file
from sdlora.models.load import load_base
from sdlora.run.arguments import make_adapter, timestep_rank, training_settings
from sdlora.run.run import Stopped


def test_timestep_rank_is_none_unless_a_minimum_is_set() -> None:
    assert timestep_rank(RunConfig()) is None
    lora = LoraConfig(timestep_rank_min=2, timestep_rank_alpha=2.0)
    assert timestep_rank(RunConfig(lora=lora)) == TimestepRank(2, 2.0)


def test_text_encoder_rate_becomes_a_factor_of_the_learning_rate() -> None:
    assert training_settings(RunConfig()).text_encoder_factor == 1.0
    document = {
        "data": {"folder": "x"},
        "lora": {"targets": ["text_encoder"]},
        "train": {"learning_rate": 4e-4, "text_encoder_learning_rate": 1e-4},
    }
    assert training_settings(parse_config(document, name="x")).text_encoder_factor == 0.25


def test_every_setting_reaches_the_layers(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    lora = LoraConfig(
        rank=4, alpha=2.0, targets=[*UNET_TARGETS, "text_encoder"], target_ranks={"mlp": 3}, target_alphas={"conv": 6},
        rslora=True, dropout=0.25, init="pissa", timestep_rank_min=2,
    )  # fmt: skip
    adapter = make_adapter(RunConfig(lora=lora), base)
    for path, layer in adapter.layers.items():
        assert layer.rank == (3 if target_of(path) == "mlp" else 4)
        assert abs(layer.scale - (6 if target_of(path) == "conv" else 2) / layer.rank**0.5) < 1e-6
        assert layer.dropout == 0.25
        assert layer.initial is not None
    base.predict(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), {"states": torch.zeros(2, 77, 16)})
    masks = [layer.rank_mask for path, layer in adapter.layers.items() if target_of(path) != "text_encoder"]
    assert {tuple(mask.sum(1).tolist()) for mask in masks if mask is not None} == {(4.0, 2.0), (3.0, 2.0)}


@pytest.fixture
def sets(overrides: list[str], images: Path, others: Path) -> list[str]:
    """Two folders in one run."""
    two = f'data.sets=[{{folder="{images}", repeats=2}}, {{folder="{others}", trigger="mizu", name="more"}}]'
    return [*overrides, "data.folder=", two]


def test_prompt_of_an_example_begins_with_its_trigger() -> None:
    example = Example("a", Path("a"), "a cat", (8, 8), (8, 8), trigger="mizu")
    assert example.prompt == "mizu, a cat"
    assert Example("a", Path("a"), "a cat", (8, 8), (8, 8)).prompt == "a cat"


def test_several_sets_have_their_own_repeats_triggers_and_names(tmp_path: Path, sets: list[str]) -> None:
    events = run(tmp_path / "run", [*sets, "preview.num_captions=8", "preview.prompts=[]"])
    (plan,) = (event for event in events if isinstance(event, PlanMade))
    assert (plan.images, plan.repeats, plan.exposures_per_image) == (8, 2, 4)
    assert [(s.name, s.images, s.repeats, s.exposures_per_image) for s in plan.sets] == [
        ("set", 5, 2, 4), ("more", 3, 1, 2),
    ]  # fmt: skip
    seen = Counter(name for event in events if isinstance(event, StepDone) for name in event.examples)
    colors = {"set": ("red", "green", "blue", "orange", "purple"), "more": ("black", "brown", "pink")}
    assert seen == {
        f"{part}/{color}.png": 4 if part == "set" else 2 for part, names in colors.items() for color in names
    }
    labels = [row["examples"] for row in metrics(tmp_path / "run") if row["event"] == "step"]
    assert labels
    header = read_file(tmp_path / "run" / "hero.safetensors").metadata
    assert header["modelspec.trigger_phrase"] == "zumi, mizu"
    prompts = {p.stem.split("_")[0] for p in (tmp_path / "run/epochs/0/previews").glob("*.png")}
    # Eight captions of the set, and new prompts of either trigger.
    assert len(prompts) == 8 + 4


def test_sets_resume_in_the_same_bytes_with_everything_on(tmp_path: Path, sets: list[str], images: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 12))
    shutil.copytree(images, tmp_path / "masked")
    mask.save(tmp_path / "masked" / "blue-mask.png")
    (tmp_path / "masked/red.txt").write_text("a {red|crimson} ball, one ||| two, three\na ball, four, five, six")
    options = [
        *(option.replace(str(images), str(tmp_path / "masked")) for option in sets),
        "data.masks=file", "data.shuffle_tags=true", "data.caption_dropout=0.2", "train.preservation_weight=0.5",
        "data.tag_dropout=0.3", "data.protected_tags=['two']", "data.keep_separator=|||", "data.wildcards=true",
        "data.caption_lines=true", "data.flip=true", "data.caption_prefix=best,", "data.caption_suffix=at night",
        f"data.preservation_folder={images}", "data.preservation_caption=a ball",
        f"cache.dir={tmp_path / 'shared'}",
    ]  # fmt: skip
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    whole.parent.mkdir()
    cut.parent.mkdir()
    run(whole, options)
    calls = iter(range(1, 100))
    with pytest.raises(Stopped):
        run(cut, options, should_stop=lambda: next(calls) >= 4)
    run(cut, options, resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))


def test_validation_images_are_split_off_all_sets(tmp_path: Path, overrides: list[str], images: Path) -> None:
    sets = f'data.sets=[{{folder="builtin:zumi"}}, {{folder="{images}"}}]'
    events = run(tmp_path / "run", [*overrides, "data.folder=", sets, "preview.enabled=false", "train.epochs=1"])
    (plan,) = (event for event in events if isinstance(event, PlanMade))
    # 24 and 5 images, of which 2 are held out.
    assert (plan.images, plan.validation_images, len(plan.split_off)) == (27, 2, 2)
    assert all("/" in name for name in plan.split_off)
    assert sum(one.images for one in plan.sets) == 27
    assert [event.validation_loss is not None for event in events if isinstance(event, EpochDone)] == [True, True]


def test_prior_images_change_the_result_and_are_not_training_images(
    tmp_path: Path, overrides: list[str], others: Path
) -> None:
    changed = ["copycheck.enabled=true", "train.learning_rate=1e-2", "train.epochs=1"]
    kept = [f"data.preservation_folder={others}", "train.preservation_weight=1"]
    plain = run(tmp_path / "plain", [*overrides, *changed])
    events = run(tmp_path / "run", [*overrides, *changed, *kept])
    assert digests(tmp_path / "plain") != digests(tmp_path / "run")
    (plan,) = (event for event in events if isinstance(event, PlanMade))
    assert (plan.images, plan.prior_images, plan.exposures_per_image) == (5, 3, 1)
    steps, plain_steps = ([e for e in found if isinstance(e, StepDone)] for found in (events, plain))
    assert [(s.examples, s.exposures, s.timesteps) for s in steps] == [
        (s.examples, s.exposures, s.timesteps) for s in plain_steps
    ]
    check = json.loads((tmp_path / "run/epochs/1/copycheck.json").read_text())
    assert not any("preserved" in preview["nearest"] for preview in check["previews"])


def test_unreached_prior_images_are_reported(tmp_path: Path, overrides: list[str]) -> None:
    kept = ["data.preservation_folder=builtin:zumi", "train.preservation_weight=1", "train.epochs=1"]
    events = run(tmp_path / "run", [*overrides, *kept, "preview.enabled=false"])
    told = [event.message for event in events if isinstance(event, Notice)]
    # 5 images in batches of 2 make 3 steps, with as many batches of preserved images.
    assert any("18 of 24 images of data.preservation_folder" in message for message in told)


def test_resuming_with_a_changed_prior_image_is_refused(tmp_path: Path, overrides: list[str], others: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(others, mine)
    options = [*overrides, f"data.preservation_folder={mine}", "train.preservation_weight=1", "preview.enabled=false"]
    metrics = tmp_path / "run" / "metrics.jsonl"

    def after_a_step() -> bool:  # before it there is no checkpoint
        return metrics.exists() and '"event": "step"' in metrics.read_text()

    with pytest.raises(Stopped):
        run(tmp_path / "run", options, should_stop=after_a_step)
    (mine / "pink.txt").write_text("another caption")
    with pytest.raises(DataError, match=r"changed, or its caption: preserved: pink\.png"):
        run(tmp_path / "run", options, resume=True)


def test_folders_named_for_two_purposes_are_refused(
    tmp_path: Path, overrides: list[str], images: Path, others: Path
) -> None:
    twice = f'data.sets=[{{folder="{images}"}}, {{folder="{images}", name="b"}}]'
    cases = [
        (["data.folder=", twice], "names a folder twice"),
        ([f"data.validation_folder={images}"], "data.validation_folder is data.folder"),
        ([f"data.preservation_folder={images}", "train.preservation_weight=1"], "data.preservation_folder is also"),
        (
            [f"data.preservation_folder={others}", f"data.validation_folder={others}", "train.preservation_weight=1"],
            "data.preservation_folder is also",
        ),
    ]
    for changes, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            run(tmp_path / "run", [*overrides, *changes])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / name / "a.png")
    faulty = f'data.sets=[{{folder="{tmp_path}/one"}}, {{folder="{tmp_path}/two"}}, {{folder="{others}"}}]'
    with pytest.raises(DataError, match=r"(?s)one' has errors.*two' has errors"):
        run(tmp_path / "run", [*overrides, "data.folder=", faulty])
    assert not (tmp_path / "run").exists()


def test_image_in_two_sets_is_reported(tmp_path: Path, overrides: list[str], images: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(images, copied)
    for name in ("green", "blue", "orange", "purple"):
        (copied / f"{name}.png").unlink()
        (copied / f"{name}.txt").unlink()
    sets = f'data.sets=[{{folder="{images}"}}, {{folder="{copied}"}}]'
    events = run(tmp_path / "run", [*overrides, "data.folder=", sets, "preview.enabled=false", "train.epochs=1"])
    told = [event.message for event in events if isinstance(event, Notice)]
    assert "set/red.png and copied/red.png are the same image; keep one of them." in told
