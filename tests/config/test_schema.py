import json

import pytest

from sdlora.config.toml import json_schema, option_fields, option_names, parse_config
from sdlora.errors import ConfigError


def faults(**document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"folder": "x"}, **document}, name="n")
    return str(caught.value)


def test_the_list_of_options_is_a_decision() -> None:
    assert option_names() == [
        "name", "seed", "base.path", "base.revision", "base.variant", "base.prediction_type",
        "base.clip_skip", "base.quantization", "data.folder", "data.sets", "data.validation_folder",
        "data.validation_split", "data.caption",
        "data.trigger", "data.class_words", "data.preservation_folder", "data.preservation_caption",
        "data.allow_trigger_only", "data.repeats", "data.resolution_px",
        "data.buckets",
        "data.bucket_step_px", "data.background", "data.masks", "data.shuffle_tags", "data.keep_tags",
        "data.max_token_windows", "data.caption_dropout",
        "lora.rank", "lora.alpha", "lora.targets", "lora.target_ranks", "lora.target_alphas", "lora.rslora",
        "lora.dora", "lora.dropout", "lora.init", "lora.timestep_rank_min", "lora.timestep_rank_alpha", "train.epochs",
        "train.batch_size", "train.gradient_accumulation_steps", "train.auto_batch", "train.optimizer",
        "train.learning_rate",
        "train.loraplus_lr_ratio", "train.text_encoder_learning_rate", "train.lr_schedule", "train.warmup_steps",
        "train.weight_decay", "train.ema_decay", "train.max_grad_norm", "train.preservation_weight",
        "train.preservation_every",
        "train.precision", "train.gradient_checkpointing", "train.compile", "train.device", "train.log_every_steps",
        "train.checkpoint_every_steps", "timesteps.density", "timesteps.mean", "timesteps.std", "timesteps.min",
        "timesteps.max", "timesteps.high_noise_keep", "timesteps.coverage", "loss.kind", "loss.huber_delta",
        "loss.weighting", "loss.gamma", "loss.mask_floor", "loss.noise_offset", "loss.zero_terminal_snr",
        "preview.enabled",
        "preview.prompts", "preview.num_captions", "preview.seeds", "preview.negative_prompt", "preview.num_steps",
        "preview.guidance", "copycheck.enabled", "copycheck.stop", "copycheck.sscd", "copycheck.dinov2",
        "file.format", "file.precision", "file.thumbnail", "file.licence", "file.include_captions", "cache.dir",
        "cache.max_text_gib",
    ]  # fmt: skip


def test_defaults_are_the_stated_ones() -> None:
    config = parse_config({"data": {"folder": "x"}}, name="n")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 8.0, ["cross_attention"])
    assert (config.train.epochs, config.train.learning_rate, config.name) == (4, 2e-4, "n")


def test_preservation_needs_all_its_parts() -> None:
    weight = {"preservation_weight": 1.0}
    assert "either data.class_words (no images needed) or data.preservation_folder" in faults(train=weight)
    both = {"folder": "x", "trigger": "zumi", "class_words": ["cat"], "preservation_folder": "cats"}
    assert "either data.class_words" in faults(data=both, train=weight)
    assert "set data.trigger" in faults(data={"folder": "x", "class_words": ["cat"]}, train=weight)
    partly = [{"folder": "a", "trigger": "zumi"}, {"folder": "b"}]
    assert "or one in every set" in faults(data={"sets": partly, "class_words": ["cat"]}, train=weight)
    alone = faults(data={"folder": "x", "preservation_folder": "cats"})
    assert "data.preservation_folder does nothing unless train.preservation_weight is above 0." in alone
    assert "belongs to data.preservation_folder" in faults(data={"folder": "x", "preservation_caption": "a cat"})
    alone = faults(data={"folder": "x", "class_words": ["cat"]})
    assert "data.class_words does nothing unless train.preservation_weight is above 0." in alone
    whole = {"data": {"folder": "x", "trigger": "zumi", "class_words": ["cat"]}, "train": weight}
    assert parse_config(whole, name="n").train.preservation_weight == 1.0
    seldom = faults(data={"folder": "x", "preservation_folder": "cats"}, train={**weight, "preservation_every": 2})
    assert "train.preservation_every does nothing unless data.class_words says what is preserved" in seldom


def test_all_faults_at_once_with_the_nearest_name() -> None:
    message = faults(data={}, lora={"rnak": 4, "rank": 0}, train={"batchsize": 2, "lr_schedule": "linear"}, sed=1)
    assert "data.folder: not set" in message
    assert "lora.rnak: there is no such setting. Did you mean lora.rank?" in message
    assert "train.batchsize: there is no such setting. Did you mean train.batch_size?" in message
    assert "lora.rank: found 0; input should be greater than or equal to 1." in message
    assert "train.lr_schedule: found 'linear'; input should be 'constant' or 'cosine'." in message
    assert "sed: there is no such setting. Did you mean seed?" in message


@pytest.mark.parametrize("epochs", [6, 9, 100])
def test_too_many_epochs_explain_copying(epochs: int) -> None:
    message = faults(train={"epochs": epochs})
    assert f"train.epochs: {epochs} is above 5" in message
    assert "copy-paste overfitting" in message


def test_sets_fill_in_what_they_do_not_say_and_have_names_of_their_own() -> None:
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


def test_impossible_pairs_and_values() -> None:
    assert "min (900) is above max (100)" in faults(timesteps={"min": 900, "max": 100})
    assert "not among lora.targets" in faults(lora={"target_ranks": {"mlp": 4}})
    assert "must be below the lowest rank of the UNet's layers (4)" in faults(lora={"rank": 4, "timestep_rank_min": 4})
    assert "no target is in the UNet" in faults(lora={"targets": ["text_encoder"], "timestep_rank_min": 4})
    assert "reaches across 800" in faults(timesteps={"high_noise_keep": 0.5, "max": 799})
    assert "loss.mask_floor does nothing unless data.masks is" in faults(loss={"mask_floor": 0.5})
    assert "gives pure noise" in faults(loss={"zero_terminal_snr": True, "weighting": "min_snr"})
    assert "does nothing unless lora.timestep_rank_min" in faults(lora={"timestep_rank_alpha": 2.0})
    assert "lora.dora goes with" in faults(lora={"dora": True, "init": "pissa"})
    assert "belong to timesteps.density" in faults(timesteps={"mean": 1.0})
    assert "belongs to loss.kind" in faults(loss={"huber_delta": 1.0})
    assert "loss.gamma belongs to" in faults(loss={"gamma": 1.0, "weighting": "debiased"})
    assert "needs 'text_encoder' among" in faults(train={"text_encoder_learning_rate": 1e-5})
    assert "data.background" in faults(data={"folder": "x", "background": "no colour"})
    assert "named twice" in faults(lora={"targets": ["mlp", "mlp"]})
    assert "train.learning_rate" in faults(train={"learning_rate": float("nan")})
    assert "data.folder: not set" in faults(data={})
    assert "name" in faults(name="../../etc")


def test_every_option_is_described_and_in_the_schema() -> None:
    schema = json.dumps(json_schema())
    for name, field in option_fields().items():
        assert (field.description or "").endswith("."), name
        assert f'"{name.rpartition(".")[2]}"' in schema
