import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdlora.common.bundled import BucketOptions, CaptionOptions
from sdlora.config.schema import RunConfig
from sdlora.config.toml import option_fields, parse_config
from sdlora.errors import ConfigError


def names(**document: object) -> list[str]:
    """The options that the message about a configuration names, in its order."""
    any_option = "|".join(map(re.escape, option_fields()))
    named = re.findall(rf"\b(?:{any_option})\b", faults(**document))
    return list(dict.fromkeys(named))


def faults(**document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"folder": "x"}, **document}, name="n")
    return str(caught.value)


def test_list_of_options_is_frozen() -> None:
    assert list(option_fields()) == [
        "name", "seed", "base.path", "base.components", "base.text_encoder", "base.vae", "base.family", "base.revision",
        "base.variant",
        "base.prediction_type", "base.clip_skip", "base.quantization", "base.offload", "base.merge",
        "base.training_adapter", "data.folder", "data.sets", "data.recursive",
        "data.exclude", "data.validation_folder", "data.validation_split", "data.caption", "data.trigger",
        "data.class_words", "data.preservation_folder", "data.preservation_caption",
        "data.allow_trigger_only", "data.repeats", "data.resolution_px", "data.resolutions_px",
        "data.buckets",
        "data.bucket_step_px", "data.max_aspect", "data.no_upscale", "data.flip", "data.background", "data.masks",
        "data.caption_prefix", "data.caption_suffix", "data.caption_lines", "data.wildcards", "data.shuffle_tags",
        "data.keep_tags", "data.keep_separator", "data.tag_dropout", "data.protected_tags", "data.max_token_windows",
        "data.caption_dropout", "lora.rank", "lora.alpha", "lora.targets", "lora.target_ranks", "lora.target_alphas",
        "lora.rslora", "lora.dora", "lora.dropout", "lora.rank_dropout", "lora.module_dropout",
        "lora.init", "lora.timestep_rank_min", "lora.timestep_rank_alpha",
        "lora.from_file",
        "train.epochs", "train.exposures", "train.batch_size", "train.gradient_accumulation_steps", "train.auto_batch",
        "train.optimizer", "train.optimizer_args",
        "train.learning_rate", "train.loraplus_lr_ratio", "train.text_encoder_learning_rate",
        "train.target_learning_rates", "train.text_encoder_epochs", "train.max_weight_norm",
        "train.lr_schedule", "train.lr_cycles",
        "train.lr_power", "train.lr_floor", "train.warmup_steps", "train.weight_decay", "train.ema_decay",
        "train.max_grad_norm", "train.preservation_weight", "train.preservation_every",
        "train.precision", "train.gradient_checkpointing",
        "train.compile", "train.device", "train.log_every_steps", "train.checkpoint_every_steps", "train.trackers",
        "timesteps.density", "timesteps.mean", "timesteps.std", "timesteps.min", "timesteps.max",
        "timesteps.high_noise_keep", "timesteps.coverage", "loss.kind", "loss.huber_delta",
        "loss.huber_schedule", "loss.weighting",
        "loss.gamma", "loss.mask_floor", "loss.noise_offset", "loss.noise_offset_random",
        "loss.multires_discount", "loss.input_perturbation", "loss.zero_terminal_snr", "preview.enabled",
        "preview.prompts", "preview.num_captions", "preview.seeds", "preview.negative_prompt", "preview.num_steps",
        "preview.guidance", "preview.sampler", "preview.width_px", "preview.height_px",
            "preview.base", "preview.base_steps", "preview.every_steps",
        "copycheck.enabled",
        "copycheck.stop", "copycheck.sscd", "copycheck.dinov2", "copycheck.parts", "file.format", "file.precision",
        "file.thumbnail",
        "file.licence", "file.include_captions", "cache.dir", "cache.max_text_gib",
    ]  # fmt: skip


_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "minItems", "pattern", "default")


def limits(node: object) -> dict[str, Any]:
    """What JSON Schema says of an option and its parts: its limits and its default."""
    found: dict[str, Any] = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in _LIMITS:
            found[str(key)] = value
        elif key != "properties":
            found |= limits(value)
    return found


def test_defaults_and_limits_are_frozen() -> None:
    # A run without an option is a run with its default: another one changes everybody's results.
    frozen = json.loads((Path(__file__).parent / "limits.json").read_text(encoding="utf-8"))
    schema = RunConfig.model_json_schema()
    tables = {"RunConfig": schema, **schema["$defs"]}
    found = {
        f"{table}.{name}": limits(info)
        for table, content in tables.items()
        for name, info in content["properties"].items()
        if "$ref" not in info
    }
    assert found == frozen
    assert len(frozen) >= 130


def test_defaults() -> None:
    config = parse_config({"data": {"folder": "x"}}, name="n")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 8.0, ["cross_attention"])
    assert (config.train.epochs, config.train.learning_rate, config.name) == (4, 2e-4, "n")


def test_preservation_without_its_other_options_is_refused() -> None:
    weight = {"preservation_weight": 1.0}
    either = ["train.preservation_weight", "data.class_words", "data.preservation_folder"]
    assert names(train=weight) == either
    both = {"folder": "x", "trigger": "zumi", "class_words": ["cat"], "preservation_folder": "cats"}
    assert names(data=both, train=weight) == either
    without_trigger = ["data.class_words", "data.trigger", "data.sets"]
    assert names(data={"folder": "x", "class_words": ["cat"]}, train=weight) == without_trigger
    partly = [{"folder": "a", "trigger": "zumi"}, {"folder": "b"}]
    assert names(data={"sets": partly, "class_words": ["cat"]}, train=weight) == without_trigger
    for way in ({"preservation_folder": "cats"}, {"class_words": ["cat"]}):
        assert names(data={"folder": "x", **way}) == [f"data.{next(iter(way))}", "train.preservation_weight"]
    captioned = {"folder": "x", "preservation_caption": "a cat"}
    assert names(data=captioned) == ["data.preservation_caption", "data.preservation_folder"]
    seldom = {**weight, "preservation_every": 2}
    found = names(data={"folder": "x", "preservation_folder": "cats"}, train=seldom)
    assert found == ["train.preservation_every", "data.class_words"]
    whole = {"data": {"folder": "x", "trigger": "zumi", "class_words": ["cat"]}, "train": weight}
    assert parse_config(whole, name="n").train.preservation_weight == 1.0


def test_all_faults_are_reported_at_once_with_the_nearest_name() -> None:
    message = faults(data={}, lora={"rnak": 4, "rank": 0}, train={"batchsize": 2, "lr_schedule": "linaer"}, sed=1)
    lines = {line.split(":")[0].strip(): line for line in message.splitlines()[1:]}
    assert lines.keys() == {"data.folder", "lora.rnak", "lora.rank", "train.batchsize", "train.lr_schedule", "sed"}
    nearest = {"lora.rnak": "lora.rank", "train.batchsize": "train.batch_size", "sed": "seed"}
    for name, near in nearest.items():
        assert lines[name].endswith(f"Did you mean {near}?")
    assert "found 0" in lines["lora.rank"] and "greater than or equal to 1" in lines["lora.rank"]
    assert all(value in lines["train.lr_schedule"] for value in ("'linaer'", "'constant'", "'cosine'", "'rex'"))


@pytest.mark.parametrize("epochs", [6, 9, 100])
def test_message_about_too_many_epochs_explains_copying(epochs: int) -> None:
    message = faults(train={"epochs": epochs})
    assert all(
        part in message for part in ("train.epochs", f"found {epochs}", "maximum is 5", "copy-paste overfitting")
    )


def test_only_a_set_has_a_weight_of_its_loss() -> None:
    sets = [{"folder": "a", "loss_weight": 0.5}, {"folder": "b"}]
    config = parse_config({"data": {"sets": sets}}, name="n")
    assert [one.loss_weight for one in config.data.sets] == [0.5, 1.0]


def test_sets_inherit_common_options_and_have_unique_names() -> None:
    sets = [{"folder": "a/x", "trigger": "mizu"}, {"folder": "b/x", "name": "other", "repeats": 3}]
    config = parse_config({"data": {"sets": sets, "trigger": "zumi", "repeats": 5}}, name="n")
    assert [(s.name, s.trigger, s.repeats, s.caption) for s in config.data.sets] == [
        ("x", "mizu", 5, None), ("other", "zumi", 3, None),
    ]  # fmt: skip
    single = parse_config({"data": {"folder": "a", "repeats": 2}}, name="n").data.sets
    assert [(s.name, s.folder, s.repeats) for s in single] == [(None, "a", 2)]
    assert parse_config({"data": {"sets": [{"folder": "builtin:zumi"}]}}, name="n").data.sets[0].name == "zumi"
    assert "must be unique and not empty, found x;" in faults(data={"sets": [{"folder": "a/x"}, {"folder": "b/x/"}]})
    assert "must be unique and not empty, found .;" in faults(data={"sets": [{"folder": "."}]})
    assert "data.folder and data.sets exclude each other" in faults(data={"folder": "x", "sets": sets})
    assert "Did you mean data.sets.repeats?" in faults(data={"sets": [{"folder": "a", "repeat": 2}]})


IMPOSSIBLE: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"timesteps": {"min": 900, "max": 100}}, ["timesteps.min", "900", "timesteps.max", "100"]),
    ({"timesteps": {"high_noise_keep": 0.5, "max": 799}}, ["timesteps.high_noise_keep", "timesteps.max", "800"]),
    ({"timesteps": {"mean": 1.0}}, ["timesteps.mean", "timesteps.density = 'logit_normal'"]),
    ({"lora": {"target_ranks": {"mlp": 4}}}, ["lora.target_ranks.mlp", "lora.targets (cross_attention)"]),
    ({"lora": {"rank": 4, "timestep_rank_min": 4}}, ["lora.timestep_rank_min (4)", "UNet", "(4)"]),
    ({"lora": {"targets": ["text_encoder"], "timestep_rank_min": 4}}, ["lora.timestep_rank_min", "UNet", "has none"]),
    ({"lora": {"timestep_rank_alpha": 2.0}}, ["lora.timestep_rank_alpha", "lora.timestep_rank_min"]),
    ({"lora": {"dora": True, "init": "pissa"}}, ["lora.dora", "lora.init = 'gaussian'"]),
    ({"lora": {"targets": ["mlp", "mlp"]}}, ["lora.targets", "['mlp', 'mlp']", "once"]),
    ({"lora": {"from_file": "x", "rslora": True}}, ["lora.rslora", "lora.from_file"]),
    ({"lora": {"from_file": "x", "init": "pissa"}}, ["lora.init", "lora.from_file"]),
    ({"base": {"merge": [{"file": "a"}, {"file": "a"}]}}, ["base.merge", "once", "sum of its weights"]),
    ({"base": {"merge": [{"file": "a", "weight": 0}]}}, ["base.merge.0.weight", "leave the entry out"]),
    ({"base": {"merge": [{"fil": "a"}]}}, ["base.merge.fil", "Did you mean base.merge.file?"]),
    ({"loss": {"mask_floor": 0.5}}, ["loss.mask_floor", "data.masks", "'alpha'", "'file'"]),
    ({"loss": {"zero_terminal_snr": True, "weighting": "min_snr"}}, ["loss.zero_terminal_snr", "'min_snr'"]),
    ({"loss": {"huber_delta": 1.0}}, ["loss.huber_delta", "loss.kind = 'huber'"]),
    ({"loss": {"gamma": 1.0, "weighting": "debiased"}}, ["loss.gamma", "'min_snr'", "'soft_min_snr'", "'p2'"]),
    ({"train": {"text_encoder_learning_rate": 1e-5}}, ["train.text_encoder_learning_rate", "lora.targets"]),
    ({"train": {"learning_rate": float("nan")}}, ["train.learning_rate", "nan"]),
    ({"data": {"folder": "x", "background": "no colour"}}, ["data.background", "'no colour'"]),
    ({"data": {"folder": "x", "resolutions_px": [64, 64]}}, ["resolutions_px of data", "once"]),
    ({"data": {"sets": [{"folder": "x", "resolutions_px": [64, 64]}]}}, ["resolutions_px of x", "once"]),
    ({"data": {"sets": [{"folder": "x", "resolutions_px": []}]}}, ["data.sets.0.resolutions_px", "at least 1"]),
    (
        {"data": {"folder": "x", "resolution_px": 64, "resolutions_px": [64, 96]}},
        ["data.resolution_px (64)", "data.resolutions_px", "96"],
    ),
    ({"data": {}}, ["data.folder"]),
]


@pytest.mark.parametrize(("document", "facts"), IMPOSSIBLE, ids=lambda value: "-".join(value)[:60])
def test_impossible_value_or_combination_is_refused(document: dict[str, Any], facts: list[str]) -> None:
    message = faults(**document)
    for fact in facts:
        assert fact in message


def test_name_that_is_a_path_is_refused() -> None:
    assert "name: found '../../etc'" in faults(name="../../etc")


def test_every_option_is_described_and_in_the_schema() -> None:
    schema = json.dumps(RunConfig.model_json_schema())
    for name, field in option_fields().items():
        assert (field.description or "").endswith("."), name
        assert f'"{name.rpartition(".")[2]}"' in schema


def test_sizes_are_the_sets_or_those_of_all() -> None:
    sets = [
        {"folder": "a", "resolutions_px": [96, 32]}, {"folder": "b"}, {"folder": "c", "no_upscale": True},
        {"folder": "d", "max_aspect": 3.0, "flip": True},
    ]  # fmt: skip
    data = parse_config({"data": {"sets": sets, "resolutions_px": [64, 128], "max_aspect": 1.5}}, name="n").data
    common = BucketOptions(max_aspect=1.5, resolutions_px=(64, 128))
    assert data.bucket_options == common
    assert [one.sizes for one in data.sets] == [
        replace(common, resolutions_px=(96, 32)), None, replace(common, no_upscale=True),
        replace(common, max_aspect=3.0),
    ]  # fmt: skip
    assert data.resolutions(512) == [32, 64, 96, 128]
    assert parse_config({"data": {"sets": sets}}, name="n").data.resolutions(512) == [32, 96, 512]
    assert parse_config({"data": {"folder": "x", "resolution_px": 64}}, name="n").data.resolutions(512) == [64]


def test_captions_vary_by_the_set_or_by_what_holds_for_all() -> None:
    document = {
        "sets": [
            {"folder": "a", "tag_dropout": 0.5, "caption_prefix": "best,", "keep_tags": 0},
            {"folder": "b", "flip": True, "exclude": []},
        ],
        "exclude": ["x.png"],
        "tag_dropout": 0.1, "caption_suffix": "outside", "protected_tags": ["x"], "recursive": True,
        "validation_folder": "v", "preservation_folder": "p",
    }  # fmt: skip
    data = parse_config({"data": document, "train": {"preservation_weight": 1.0}}, name="n").data
    first, second = data.sets
    common = CaptionOptions(tag_dropout=0.1, caption_suffix="outside", protected_tags=("x",))
    assert first.captions == replace(common, tag_dropout=0.5, caption_prefix="best,", keep_tags=0)
    assert second.captions == common
    assert data.validation_set is not None and data.validation_set.captions == common
    # What is preserved gets neither trigger nor prefix nor suffix.
    assert data.prior_set is not None and data.prior_set.captions == replace(common, caption_suffix="")
    assert [one.exclude for one in (first, second, data.validation_set, data.prior_set)] == [("x.png",), (), (), ()]
    assert all(one.recursive for one in (first, second, data.validation_set, data.prior_set))
    assert not parse_config({"data": {"sets": [{"folder": "a"}]}}, name="n").data.sets[0].recursive
    assert [one.flip for one in (first, second, data.validation_set, data.prior_set)] == [False, True, False, False]
    found = faults(data={"sets": [{"folder": "a", "tag_dropout": 2}]})
    assert "data.sets.0.tag_dropout: found 2" in found
