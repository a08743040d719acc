"""No option without an effect: each one is changed alone, and the run must come out differently."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from counts import saved_for_backward
from diffusers import StableDiffusionPipeline
from helpers.tiny import make_tiny, make_tiny_pipeline
from helpers.trainers import kohya_trainer
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from sdlora.config.toml import load_config, option_fields
from sdlora.errors import BaseModelError, ConfigError, DataError, OutOfMemoryError
from sdlora.lora import block_offload
from sdlora.models import load
from sdlora.run import setup
from sdlora.run.run import start
from sdlora.training.loss import ExposureLoss
from sdlora.training.trainer import Trainer


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, str]:
    """Folders for the runs below; images with transparency and tags, wide and square."""
    root = tmp_path_factory.mktemp("options")
    folder = root / "set"
    folder.mkdir()
    for index, color in enumerate([(200, 30, 30, 255), (30, 200, 30, 90), (30, 30, 200, 255)]):
        Image.new("RGBA", (64, 32) if index == 2 else (32, 32), color).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"first {index}, second, third, fourth")
    (folder / "more").mkdir()
    Image.new("RGB", (32, 32), "yellow").save(folder / "more/p3.png")
    (folder / "more/p3.txt").write_text("first 3, second")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "p0-mask.png")
    bare = root / "bare"
    bare.mkdir()
    Image.new("RGB", (32, 32), "red").save(bare / "a.png")
    make_tiny_pipeline(root / "v", prediction_type="v_prediction")
    make_tiny("sd1", root / "deep")
    theirs = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    kohya_trainer(root / "theirs.safetensors", theirs, rank=2)
    return {
        "root": str(root), "set": str(folder), "bare": str(bare), "base": str(tiny_base), "v": str(root / "v"),
        "deep": str(root / "deep"), "file": str(root / "theirs.safetensors"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcome(scene: dict[str, str]) -> Callable[..., str]:
    """Runs the common configuration with changes; returns a digest of adapter, previews and file names."""
    count = iter(range(10_000))
    source = Path(scene["root"]) / "common.toml"
    source.write_text(
        f"""
        [base]
        path = "{scene["base"]}"
        [data]
        folder = "{scene["set"]}"
        resolution_px = 32
        bucket_step_px = 8
        trigger = "zumi"
        repeats = 2
        [lora]
        rank = 2
        [train]
        batch_size = 2
        epochs = 1
        learning_rate = 1e-2
        device = "cpu"
        precision = "fp32"
        [preview]
        num_steps = 1
        prompts = ["a red ball"]
        num_captions = 0
        seeds = [0]
        [copycheck]
        enabled = false
        [cache]
        dir = "{scene["root"]}/cache"
        """
    )

    def run(*changes: str) -> str:
        folder = Path(scene["root"]) / f"run{next(count)}"
        try:
            config = load_config(str(source), changes)
            for _ in start(config, folder):
                pass
        except (ConfigError, DataError, BaseModelError) as error:
            return f"{type(error).__name__}: {error}"
        digest = hashlib.sha256()
        # A DoRA has a copy for diffusers beside it.
        (file,) = (file for file in folder.glob("*.safetensors") if not file.stem.endswith("-peft"))
        for key, tensor in sorted(load_file(file).items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        for path in sorted([*folder.glob("epochs/*/previews/*.png"), *folder.glob("steps/*/previews/*.png")]):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        digest.update(str([path.parent.name for path in sorted(folder.glob("epochs/*/copycheck.json"))]).encode())
        checkpoints = sorted(path.name for path in folder.glob("checkpoints/*"))
        return f"{file.name} {checkpoints} {digest.hexdigest()}"

    return run


@pytest.fixture(scope="module")
def known(outcome: Callable[..., str]) -> Callable[..., str]:
    """The same, where equal changes are run once, since they give the same run."""
    return cache(outcome)


@pytest.fixture(scope="module")
def common(known: Callable[..., str]) -> str:
    return known()


CHANGES: dict[str, list[str]] = {
    "name": ["name=other"],
    "seed": ["seed=1"],
    "base.path": ["base.path={v}"],
    "base.family": ["base.family=pocket"],
    "base.variant": ["base.variant=fp16"],
    "base.prediction_type": ["base.prediction_type=v_prediction"],
    "base.clip_skip": ["base.path={deep}", "base.clip_skip=2"],
    "base.merge": ['base.merge=[{file="{file}", weight=0.5}]'],
    "data.folder": ["data.folder=builtin:zumi"],
    "data.sets": ["data.folder=", 'data.sets=[{folder="{set}", repeats=1}, {folder="builtin:zumi"}]'],
    "data.recursive": ["data.recursive=true"],
    "data.exclude": ['data.exclude=["p1.png"]'],
    "data.caption": ["data.folder={bare}", "data.caption=a thing"],
    "data.trigger": ["data.trigger=mizu"],
    "data.class_words": ['data.class_words=["cat"]', "train.preservation_weight=1"],
    "data.preservation_folder": ["data.preservation_folder=builtin:blueprint", "train.preservation_weight=1"],
    "data.preservation_caption": [
        "data.preservation_folder={bare}",
        "train.preservation_weight=1",
        "data.preservation_caption=a thing",
    ],
    "data.allow_trigger_only": ["data.folder={bare}", "data.allow_trigger_only=true"],
    "data.repeats": ["data.repeats=3"],
    "data.resolution_px": ["data.resolution_px=40"],
    "data.resolutions_px": ["data.resolution_px=40", "data.resolutions_px=[32, 40]"],
    "data.buckets": ["data.buckets=false"],
    "data.bucket_step_px": ["data.bucket_step_px=16"],
    "data.max_aspect": ["data.max_aspect=1.0"],
    "data.no_upscale": ["data.resolution_px=40", "data.no_upscale=true"],
    "data.flip": ["data.folder=builtin:zumi", "data.flip=true"],
    "data.background": ["data.background=black"],
    "data.masks": ["data.masks=file"],
    "data.shuffle_tags": ["data.shuffle_tags=true"],
    "data.caption_prefix": ["data.caption_prefix=best"],
    "data.caption_suffix": ["data.caption_suffix=outside"],
    "data.caption_lines": ["data.folder={bare}", 'data.caption="one\\ntwo"', "data.caption_lines=true"],
    "data.wildcards": ["data.folder={bare}", "data.caption=a {red|blue} thing", "data.wildcards=true"],
    "data.keep_separator": [
        "data.folder={bare}",
        "data.caption=a ||| b, c, d",
        "data.shuffle_tags=true",
        "data.keep_separator=|||",
    ],
    "data.tag_dropout": ["data.tag_dropout=0.5"],
    "data.protected_tags": ["data.tag_dropout=1.0", 'data.protected_tags=["third"]'],
    "data.max_token_windows": ["data.max_token_windows=2"],
    "data.caption_dropout": ["data.caption_dropout=0.5"],
    "lora.rank": ["lora.rank=3"],
    "lora.alpha": ["lora.alpha=1"],
    "lora.targets": ['lora.targets=["mlp"]'],
    "lora.target_ranks": ["lora.target_ranks={cross_attention = 3}"],
    "lora.target_alphas": ["lora.target_alphas={cross_attention = 1.0}"],
    "lora.rslora": ["lora.rslora=true"],
    "lora.dora": ["lora.dora=true"],
    "lora.dropout": ["lora.dropout=0.5"],
    "lora.rank_dropout": ["lora.rank_dropout=0.5"],
    "lora.module_dropout": ["lora.module_dropout=0.5"],
    "lora.init": ["lora.init=pissa"],
    "lora.timestep_rank_min": ["lora.timestep_rank_min=1"],
    "lora.timestep_rank_alpha": ["lora.rank=8", "lora.timestep_rank_min=1", "lora.timestep_rank_alpha=0.2"],
    "lora.from_file": ["lora.from_file={file}"],
    "train.epochs": ["train.epochs=2"],
    "train.batch_size": ["train.batch_size=1"],
    "train.gradient_accumulation_steps": ["train.gradient_accumulation_steps=2"],
    "base.quantization": ["base.quantization=int8"],
    "train.learning_rate": ["train.learning_rate=5e-3"],
    "train.text_encoder_learning_rate": ['lora.targets=["text_encoder"]', "train.text_encoder_learning_rate=1e-3"],
    "train.target_learning_rates": ["train.target_learning_rates={up = 3e-3}"],
    "train.text_encoder_epochs": [
        'lora.targets=["text_encoder"]',
        "train.epochs=2",
        "train.text_encoder_epochs=1",
    ],
    "train.lr_schedule": ["train.lr_schedule=cosine"],
    "train.max_weight_norm": ["train.max_weight_norm=1e-4"],
    "train.lr_cycles": ["train.lr_schedule=cosine_restarts", "train.lr_cycles=2"],
    "train.lr_power": ["train.lr_schedule=polynomial", "train.lr_power=3"],
    "train.lr_floor": ["train.lr_schedule=cosine", "train.lr_floor=0.5"],
    "train.warmup_steps": ["train.warmup_steps=2"],
    "train.weight_decay": ["train.weight_decay=0.5"],
    "train.optimizer": ["train.optimizer=lion"],
    "train.optimizer_args": ["train.optimizer_args={betas = [0.5, 0.9]}"],
    "train.loraplus_lr_ratio": ["train.loraplus_lr_ratio=4"],
    "train.ema_decay": ["train.ema_decay=0.5"],
    "train.max_grad_norm": ["train.max_grad_norm=1e-7"],
    "train.preservation_weight": ['data.class_words=["cat"]', "train.preservation_weight=1"],
    "train.preservation_every": [
        'data.class_words=["cat"]',
        "train.preservation_weight=1",
        "train.preservation_every=2",
    ],
    "train.precision": ["train.precision=bf16"],
    "train.device": ["train.device=nothing"],
    "train.checkpoint_every_steps": ["train.checkpoint_every_steps=1"],
    "timesteps.density": ["timesteps.density=speed"],
    "timesteps.mean": ["timesteps.density=logit_normal", "timesteps.mean=1"],
    "timesteps.std": ["timesteps.density=logit_normal", "timesteps.std=2"],
    "timesteps.min": ["timesteps.min=500"],
    "timesteps.max": ["timesteps.max=500"],
    "timesteps.high_noise_keep": ["timesteps.high_noise_keep=0.1"],
    "timesteps.coverage": ["timesteps.coverage=none"],
    "loss.kind": ["loss.kind=huber"],
    "loss.huber_delta": ["loss.kind=huber", "loss.huber_delta=0.5"],
    "loss.huber_schedule": ["loss.kind=huber", "loss.huber_schedule=snr"],
    "loss.weighting": ["loss.weighting=min_snr"],
    "loss.gamma": ["loss.weighting=min_snr", "loss.gamma=1"],
    "loss.mask_floor": ["data.masks=file", "loss.mask_floor=0"],
    "loss.noise_offset_random": ["loss.noise_offset=0.1", "loss.noise_offset_random=true"],
    "loss.multires_discount": ["loss.multires_discount=0.3"],
    "loss.input_perturbation": ["loss.input_perturbation=0.1"],
    "loss.noise_offset": ["loss.noise_offset=0.1"],
    "preview.enabled": ["preview.enabled=false"],
    "preview.prompts": ['preview.prompts=["a blue cat"]'],
    "preview.num_captions": ["preview.num_captions=1"],
    "preview.seeds": ["preview.seeds=[1]"],
    "preview.sampler": ["preview.sampler=euler_a"],
    "preview.width_px": ["preview.width_px=64"],
    "preview.height_px": ["preview.height_px=64"],
    "preview.every_steps": ["preview.every_steps=1"],
    "preview.negative_prompt": ["preview.negative_prompt=red"],
    "preview.num_steps": ["preview.num_steps=2"],
    "preview.guidance": ["preview.guidance=2.0"],
    "copycheck.enabled": ["copycheck.enabled=true"],
    "file.format": ["file.format=peft"],
    "file.precision": ["file.precision=fp16"],
}
REFUSED_HERE = {"base.family", "base.variant", "train.device"}
TESTED_BELOW = {
    # Parts of base models: tests/models/test_network_file.py, test_own_parts.py, and tests/run/test_run_sibling.py
    "base.components", "base.text_encoder", "base.vae", "base.training_adapter", "preview.base", "preview.base_steps",
    "base.revision", "data.validation_folder", "data.validation_split", "data.keep_tags", "train.log_every_steps",
    "cache.dir",
    "cache.max_text_gib",
    "file.thumbnail",
    "file.licence",
    "file.include_captions",
    "loss.zero_terminal_snr", "copycheck.stop", "copycheck.sscd", "copycheck.dinov2", "copycheck.parts",
    "train.gradient_checkpointing", "base.offload",
    "train.auto_batch", "train.compile", "train.trackers", "train.exposures",
}  # fmt: skip


def test_every_option_is_covered() -> None:
    assert set(CHANGES) | TESTED_BELOW == set(option_fields())


def filled(change: str, scene: dict[str, str]) -> str:
    """A change with the scene's folders in it."""
    for word, folder in scene.items():
        change = change.replace(f"{{{word}}}", folder)
    return change


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_shows(name: str, common: str, known: Callable[..., str], scene: dict[str, str]) -> None:
    changes = [filled(change, scene) for change in CHANGES[name]]
    result = known(*changes)
    assert result != common
    assert ".safetensors " in result or name in REFUSED_HERE, result
    if len(changes) > 1 and name not in ("data.caption", "data.allow_trigger_only"):
        assert result != known(*changes[:-1]), "the last change alone must show"


def test_the_same_settings_give_the_same_run(common: str, outcome: Callable[..., str]) -> None:
    assert outcome() == common


def test_every_optimizer_trains_or_says_what_is_missing(outcome: Callable[..., str]) -> None:
    found = {
        name: outcome(f"train.optimizer={name}", f"train.learning_rate={rate}")
        for name, rate in {"adamw": 1e-2, "prodigy": 1, "adafactor": 1e-2, "lion": 1e-2, "schedule_free": 1e-2}.items()
    }
    assert all(result.startswith("common.safetensors") for result in found.values()), found
    assert len(set(found.values())) == len(found)
    assert "needs a GPU" in outcome("train.optimizer=adamw8bit")


def test_captions_for_all_and_trigger_only_work(known: Callable[..., str], scene: dict[str, str]) -> None:
    bare = f"data.folder={scene['bare']}"
    assert known(bare).startswith("DataError")
    assert known(bare, "data.caption=a thing").startswith("common.safetensors")
    assert known(bare, "data.allow_trigger_only=true").startswith("common.safetensors")


def test_images_are_split_off_only_if_they_may_be(outcome: Callable[..., str], scene: dict[str, str]) -> None:
    zumi = ["data.folder=builtin:zumi", "preview.enabled=false"]
    split = outcome(*zumi)
    assert split.startswith("common.safetensors")
    assert outcome(*zumi, "data.validation_split=false") != split
    # With images of the user's own to measure on, every image of the set is trained.
    held = f"data.validation_folder={scene['set']}"
    assert outcome(*zumi, held) == outcome(*zumi, held, "data.validation_split=false") != split


def test_kept_tags_change_what_is_shuffled(known: Callable[..., str]) -> None:
    assert known("data.shuffle_tags=true") != known("data.shuffle_tags=true", "data.keep_tags=3")


def test_class_words_and_weight_of_preservation_both_count(known: Callable[..., str]) -> None:
    changes = ['data.class_words=["cat"]', "train.preservation_weight=1"]
    both = known(*changes)
    assert both.startswith("common.safetensors")
    assert known('data.class_words=["dog"]', changes[1]) != both
    assert known(changes[0], "train.preservation_weight=2") != both
    assert known(changes[0]).startswith("ConfigError")
    assert known(changes[1]).startswith("ConfigError")


@pytest.mark.parametrize(
    ("option", "common_change", "changes"),
    [
        (
            "timesteps.density",
            "timesteps.coverage=image",
            ["uniform", "logit_normal", "cubic_high", "cubic_low", "speed"],
        ),
        ("timesteps.coverage", "timesteps.density=uniform", ["none", "batch", "image"]),
        ("timesteps.mean", "timesteps.density=logit_normal", ["0", "1"]),
        ("timesteps.std", "timesteps.density=logit_normal", ["1", "2"]),
        ("loss.weighting", "loss.kind=mse", ["constant", "min_snr", "soft_min_snr", "p2", "debiased"]),
        ("loss.huber_delta", "loss.kind=huber", ["0.1", "0.5"]),
        ("loss.gamma", "loss.weighting=min_snr", ["5", "1"]),
        ("train.text_encoder_learning_rate", 'lora.targets=["text_encoder"]', ["1e-2", "1e-3"]),
        ("data.masks", "seed=0", ["none", "alpha", "file"]),
        ("loss.zero_terminal_snr", "base.path={v}", ["false", "true"]),
    ],
)
def test_every_value_is_a_run_of_its_own(
    option: str, common_change: str, changes: list[str], known: Callable[..., str], scene: dict[str, str]
) -> None:
    found = [known(filled(common_change, scene), f"{option}={value}") for value in changes]
    assert all(result.startswith("common.safetensors") for result in found), found
    assert len(set(found)) == len(changes)


def test_bad_values_name_the_allowed_ones(outcome: Callable[..., str]) -> None:
    for option, allowed in [
        ("timesteps.density", "'uniform', 'logit_normal', 'cubic_high', 'cubic_low' or 'speed'"),
        ("timesteps.coverage", "'none', 'batch' or 'image'"),
        ("loss.weighting", "'constant', 'min_snr', 'soft_min_snr', 'p2' or 'debiased'"),
        ("loss.kind", "'mse' or 'huber'"),
        ("lora.init", "'gaussian', 'orthogonal' or 'pissa'"),
        (
            "train.optimizer",
            "adamw, adamw8bit, prodigy, adafactor, lion, schedule_free, muon, or a class as 'module:Class'",
        ),
    ]:
        found = outcome(f"{option}=somethingelse")
        assert found.startswith("ConfigError"), found
        assert allowed in found
    assert "greater than 0" in outcome("timesteps.high_noise_keep=0")
    assert "v-prediction base" in outcome("loss.zero_terminal_snr=true")


def test_the_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def refuse(source: str, **options: Any) -> None:
        asked.update(options, source=source)
        raise OSError("offline")

    monkeypatch.setattr(load.DiffusionPipeline, "download", refuse)
    options = load.LoadOptions(revision="abc", variant="fp16")
    with pytest.raises(BaseModelError, match="offline"):
        load.load_base("owner/name", device=torch.device("cpu"), dtype=torch.float32, options=options)
    assert (asked["source"], asked["revision"], asked["variant"]) == ("owner/name", "abc", "fp16")
    assert asked["use_safetensors"] is True


def test_losses_are_read_back_as_seldom_as_asked(monkeypatch: pytest.MonkeyPatch, outcome: Callable[..., str]) -> None:
    sizes: list[int] = []
    original = Trainer._read_back

    def count(self: Trainer, epoch: int, unread: Any, since: float) -> Any:
        sizes.append(len(unread))
        return original(self, epoch, unread, since)

    monkeypatch.setattr(Trainer, "_read_back", count)
    outcome("train.log_every_steps=1")
    assert set(sizes) == {1}
    sizes.clear()
    outcome("train.log_every_steps=100")
    assert max(sizes) > 1


def test_memory_that_is_too_small_ends_a_run_or_makes_it_compute_in_parts(
    monkeypatch: pytest.MonkeyPatch, outcome: Callable[..., str]
) -> None:
    original = ExposureLoss.__call__

    def small(self: ExposureLoss, exposures: Any, *others: Any) -> Any:
        if len(exposures) > 1:
            raise torch.OutOfMemoryError
        return original(self, exposures, *others)

    monkeypatch.setattr(ExposureLoss, "__call__", small)
    with pytest.raises(OutOfMemoryError, match=r"train\.batch_size = 1 .*\(now 2 "):
        outcome("preview.enabled=false")
    assert outcome("preview.enabled=false", "train.auto_batch=true").startswith("common.safetensors")


def test_checkpointing_trains_the_same_and_keeps_less(
    common: str, outcome: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    original = ExposureLoss.__call__

    def count(self: ExposureLoss, *arguments: Any) -> Any:
        with saved_for_backward(self.base.network) as saved:
            losses = original(self, *arguments)
        kept.append(saved.held_bytes)
        return losses

    monkeypatch.setattr(ExposureLoss, "__call__", count)
    assert outcome() == common
    most = max(kept)
    kept.clear()
    assert outcome("train.gradient_checkpointing=true") == common
    assert max(kept) < 0.6 * most
    # What is drawn for dropout must be drawn again alike.
    assert outcome("lora.dropout=0.5") == outcome("lora.dropout=0.5", "train.gradient_checkpointing=true")


def test_blocks_that_wait_on_the_host_learn_the_same(
    outcome: Callable[..., str], common: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, plain = [], block_offload._Block.fetch

    def fetch(self: Any, copies: Any) -> None:
        fetched.append(self)
        plain(self, copies)

    monkeypatch.setattr(block_offload._Block, "fetch", fetch)
    assert outcome("base.offload=blocks") == common
    assert fetched


def test_compiled_blocks_learn_the_same(tmp_path: Path, outcome: Callable[..., str], scene: dict[str, str]) -> None:
    refused = {
        "lora.dropout=0.5": "lora.dropout = 0", "base.quantization=int8": "'none'",
        "base.offload=blocks": "base.offload = 'none'",
    }  # fmt: skip
    for other, said in refused.items():
        found = outcome("train.compile=true", other)
        assert found.startswith("ConfigError") and "train.compile requires" in found and said in found
    files = []
    # Traced as by the real compiler, which takes a minute; `tests/run/test_run.py` has a run with that.
    torch.compiler.set_default_backend("aot_eager")
    try:
        for choice in ("false", "true"):
            before = counters["stats"]["unique_graphs"]
            changes = [f"train.compile={choice}", "data.buckets=false", "preview.enabled=false", "train.batch_size=1"]
            config = load_config(str(Path(scene["root"]) / "common.toml"), changes)
            for _ in start(config, tmp_path / choice):
                pass
            files.append(load_file(tmp_path / choice / "common.safetensors"))
            assert (counters["stats"]["unique_graphs"] > before) == (choice == "true")
    finally:
        torch.compiler.set_default_backend(None)
    for name, tensor in files[0].items():
        assert (files[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_the_cache_is_where_it_should_be(outcome: Callable[..., str], scene: dict[str, str]) -> None:
    folder = Path(scene["root"]) / "elsewhere"
    outcome(f"cache.dir={folder}")
    assert len(list(folder.glob("moments/*/*.safetensors"))) == 3
    assert len(list(folder.glob("text/*/*.safetensors"))) == 3


@pytest.mark.parametrize(
    "changes",
    [
        ["data.shuffle_tags=true", "data.caption_dropout=0.3"],
        ["data.shuffle_tags=true", 'data.class_words=["cat", "dog"]', "train.preservation_weight=1"],
        ["data.preservation_folder=builtin:blueprint", "train.preservation_weight=1", "data.caption_dropout=0.3"],
        ["copycheck.enabled=true", "preview.num_captions=1"],
    ],
)
def test_captions_that_are_not_kept_train_the_same(
    changes: list[str], outcome: Callable[..., str], scene: dict[str, str]
) -> None:
    folders = [Path(scene["root"]) / f"{name} {abs(hash(str(changes)))}" for name in ("kept", "live")]
    kept = outcome(*changes, f"cache.dir={folders[0]}")
    live = outcome(*changes, f"cache.dir={folders[1]}", "cache.max_text_gib=0")
    assert kept.startswith("common.safetensors")
    assert live == kept
    assert list(folders[0].glob("text/*/*.safetensors"))
    assert not (folders[1] / "text").exists()


def test_the_speed_of_a_timestep_rank_and_the_kind_of_start_count(known: Callable[..., str]) -> None:
    masked = ["lora.rank=8", "lora.timestep_rank_min=1"]
    found = [known(*masked, f"lora.timestep_rank_alpha={speed}") for speed in (1.0, 0.2)]
    found += [known(f"lora.init={start}") for start in ("orthogonal", "pissa")]
    assert all(result.startswith("common.safetensors") for result in found)
    assert len(set(found)) == 4


def test_the_text_encoder_is_trained_where_it_is_a_target(known: Callable[..., str]) -> None:
    words = ['data.class_words=["cat"]', "train.preservation_weight=1"]
    targets = 'lora.targets=["text_encoder"]'
    found = [known(targets), known(targets, *words), known(targets, "lora.dropout=0.5")]
    assert all(result.startswith("common.safetensors") for result in found)
    assert len(set(found)) == 3


def test_a_network_that_cannot_be_had_is_told_and_the_run_goes_on(
    outcome: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    real = setup.load_embedders

    def load_embedders(*, sscd: bool, dinov2: bool, device: torch.device) -> Any:
        asked.append((sscd, dinov2))
        return real(sscd=sscd, dinov2=dinov2, device=device)

    monkeypatch.setattr(setup, "load_embedders", load_embedders)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checked = "copycheck.enabled=true"
    for option in ("copycheck.sscd=true", "copycheck.dinov2=true"):
        assert outcome(checked, option).startswith("common.safetensors")
    assert asked == [(True, False), (False, True)]
    # Stopping is a test of the whole run's.
    assert outcome("copycheck.stop=true").startswith("ConfigError: ")
    assert "preview.enabled" in outcome(checked, "copycheck.sscd=true", "preview.enabled=false")
