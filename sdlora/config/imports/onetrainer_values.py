"""OneTrainer's settings that need more than a rename: functions of the table in `onetrainer`.

Each takes a value and all settings, and returns what becomes of it.
"""

from __future__ import annotations

from typing import Any

from sdlora.config.imports.previews import every_steps, previews
from sdlora.config.imports.rules import (
    OFF,
    Outcome,
    Rule,
    Source,
    compute,
    dropped,
    flag,
    number,
    refused,
    text,
    translated,
    whole,
)  # fmt: skip
from sdlora.config.imports.shared import (
    TRANSFORMER_BLOCKS,
    Length,
    TrainingFolder,
    data_options,
    optimizer,
    optimizer_argument,
    resolution,
    resolutions,
    schedule,
    spread,
    warmup,
)  # fmt: skip
from sdlora.config.prompt_lines import SAMPLERS

_FAMILIES = {
    "STABLE_DIFFUSION_15": "sd1",
    "STABLE_DIFFUSION_20": "sd2",
    "STABLE_DIFFUSION_20_BASE": "sd2",
    "STABLE_DIFFUSION_21": "sd2",
    "STABLE_DIFFUSION_21_BASE": "sd2",
    "STABLE_DIFFUSION_XL_10_BASE": "sdxl",
}
_LAYERS = {
    "attentions": TRANSFORMER_BLOCKS,
    "attn": ["cross_attention", "self_attention"],
    "attn2": ["cross_attention"],
    "attn1": ["self_attention"],
    "ff": ["mlp"],
}


def _folders(source: Source, kind: str = "STANDARD") -> list[TrainingFolder]:
    rows = [row for row in source.rows["concepts"] if row.get("type", "STANDARD") == kind]
    return [
        TrainingFolder(
            text(row["path"]),
            max(number(row.get("balancing", 1)), 0),
            recursive=flag(row.get("include_subdirectories", False)),
        )
        for row in rows
        if row.get("path")
    ]


def _length(source: Source) -> Length:
    return spread(number(source.get("epochs")), [one.repeats for one in _folders(source)])


def epochs(value: Any, source: Source) -> Outcome:
    """The length in epochs."""
    found = _length(source)
    if not _folders(source):
        return refused(
            f"the repeats are not known, since no concept is; set train.exposures, {value} if there are none"
        )
    return translated({"train.epochs": found.epochs}, found.remark)


def data(value: Any, source: Source) -> Outcome:
    """The folders of training images with their repeats, and that of validation images."""
    folders = _folders(source)
    if not folders:
        return refused("no concept with images for training; set data.folder")
    if any(row.get("balancing_strategy", "REPEATS") == "SAMPLES" for row in source.rows["concepts"]):
        return refused(
            "sdlora repeats whole folders, not a number of samples; set data.repeats", data_options(folders, None)
        )
    found = data_options(folders, _length(source))
    validation = _folders(source, "VALIDATION")
    if len(validation) > 1:
        return refused("sdlora has one folder of validation images; set data.validation_folder", found)
    return translated(found | ({"data.validation_folder": validation[0].folder} if validation else {}))


def resolution_of(value: Any, source: Source) -> Outcome:
    """The resolution, or several with commas between them, of which every image gets one by chance."""
    parts = text(value).split(",")
    if len(parts) == 1 or any("x" in part for part in parts):
        return resolution(value)
    return resolutions(parts)


def concept_type(value: Any, source: Source) -> Outcome:
    """What the concepts are for."""
    if "PRIOR_PREDICTION" in value:
        return refused("preserve what the base model knows with data.class_words and train.preservation_weight")
    return dropped("see concepts.path")


def method(value: Any, source: Source) -> Outcome:
    """What is trained: a LoRA, or anything else."""
    return dropped("what sdlora trains") if text(value) == "LORA" else refused(f"sdlora trains LoRAs, not {value}")


def model_type(value: Any, source: Source) -> Outcome:
    """The model family."""
    name = text(value)
    if name not in _FAMILIES:
        return refused(f"sdlora trains Stable Diffusion 1.x, 2.x and XL, not {name}")
    options = {"base.family": _FAMILIES[name]}
    # 2.x predicts v at 768 px.
    is_v = name in ("STABLE_DIFFUSION_20", "STABLE_DIFFUSION_21")
    return translated(options | ({"base.prediction_type": "v_prediction"} if is_v else {}))


def _encoders(source: Source) -> list[bool]:
    """Whether each text encoder that the family has is trained."""
    two = "XL" in text(source.get("model_type"))
    return [flag(source.get(f"{part}.train")) for part in ("text_encoder", "text_encoder_2")[: 2 if two else 1]]


def layers(value: Any, source: Source) -> Outcome:
    """The layers that get an adapter, by the name of a preset or by parts of their names."""
    preset, given = text(value), text(source.get("layer_filter", ""))
    remark = ""
    if preset == "full" or (preset == "custom" and not given):
        targets, remark = [*TRANSFORMER_BLOCKS, "conv"], "without the time embeddings, and the first and last layer"
    else:
        names = {"attn-mlp": "attentions", "attn-only": "attn"}.get(preset, given).split(",")
        found = [_LAYERS.get(name.strip()) for name in names]
        if None in found or flag(source.get("layer_filter_regex", False)):
            return refused(f"sdlora chooses layers by kind, not by {given or preset!r}; set lora.targets")
        targets = list(dict.fromkeys(target for part in found if part for target in part))
    if not flag(source.get("unet.train", True)):
        targets, remark = [], ""
    encoders = _encoders(source)
    return translated({"lora.targets": [*targets, *(["text_encoder"] if all(encoders) else [])]}, remark)


def encoder_train(value: Any, source: Source) -> Outcome:
    """Whether the text encoders are trained."""
    encoders = _encoders(source)
    if len(set(encoders)) > 1:
        return refused("sdlora trains both text encoders or none; set lora.targets")
    return dropped("the text encoders are trained" if encoders[0] else "off")


def encoder_two(value: Any, source: Source) -> Outcome:
    """Whether the second text encoder is trained."""
    return encoder_train(value, source) if len(_encoders(source)) > 1 else dropped("this family has one text encoder")


def encoder_rate(value: Any, source: Source) -> Outcome:
    """The text encoders' learning rates."""
    if not all(_encoders(source)):
        return dropped("the text encoder is not trained")
    rates = {number(source.get(f"{part}.learning_rate", source.get("learning_rate"))) for part in _names(source)}
    if len(rates) > 1:
        return refused("sdlora has one rate for both text encoders; set train.text_encoder_learning_rate")
    return translated({"train.text_encoder_learning_rate": rates.pop()})


def _names(source: Source) -> list[str]:
    return ["text_encoder", "text_encoder_2"][: len(_encoders(source))]


def rate(value: Any, source: Source) -> Outcome:
    """The learning rate of whatever has none of its own."""
    if source.get("unet.learning_rate") is not None:
        return dropped("unet.learning_rate goes before it")
    return translated({"train.learning_rate": number(value)})


def stop(value: Any, source: Source) -> Outcome:
    """When training of the text encoder ends."""
    unit = text(source.get("text_encoder.stop_training_after_unit", "NEVER"))
    if not all(_encoders(source)) or unit == "NEVER" or not number(value):
        return dropped("off")
    if unit == "EPOCH" and number(value) >= number(source.get("epochs")):
        return dropped("not before the end")
    return refused("sdlora trains text encoders to the end; set lora.targets without text_encoder to leave them out")


def layer_skip(value: Any, source: Source) -> Outcome:
    """Layers of the text encoder that are left out, counted from the family's own."""
    skipped = whole(value)
    if not skipped:
        return dropped("the family's own layer")
    two = len(_encoders(source)) > 1
    if two and source.get("text_encoder_2_layer_skip", 0) != source.get("text_encoder_layer_skip", 0):
        return refused("sdlora reads the same layer of both text encoders; set base.clip_skip")
    if "_2" in text(source.get("model_type")):
        return refused("set base.clip_skip, counted from the last layer")
    return translated({"base.clip_skip": skipped + (2 if two else 1)})


def caption_dropout(value: Any, source: Source) -> Outcome:
    """Share of empty captions, per text encoder."""
    if len({number(source.get(f"{part}.dropout_probability", 0)) for part in _names(source)}) > 1:
        return refused("sdlora drops a caption for both text encoders; set data.caption_dropout")
    return translated({"data.caption_dropout": number(value)})


def weights(value: Any, source: Source) -> Outcome:
    """The precision of the UNet's frozen weights."""
    name = text(value)
    if name in ("NONE", "FLOAT_32", "FLOAT_16", "BFLOAT_16", "TFLOAT_32"):
        return dropped("train_dtype counts")
    kinds = {"INT_8": "int8", "FLOAT_8": "fp8", "NFLOAT_4": "nf4"}
    if name in kinds:
        return translated({"base.quantization": kinds[name]})
    return refused("sdlora quantizes to int8, fp8 and nf4; set base.quantization")


def peft_type(value: Any, source: Source) -> Outcome:
    """The type of adapter."""
    return (
        dropped("what sdlora trains") if value == "LORA" else refused(f"sdlora trains LoRA and DoRA, not {text(value)}")
    )


def dora(value: Any, source: Source) -> Outcome:
    """DoRA."""
    if not flag(value):
        return dropped("off")
    if not flag(source.get("lora_decompose_output_axis", False)):
        return refused("its magnitudes belong to inputs, and those of sdlora's lora.dora to outputs")
    return translated({"lora.dora": True})


def optimizer_of(value: Any, source: Source) -> Outcome:
    """The optimizer."""
    decay = source.get("optimizer.weight_decay", 0.01 if text(value) == "SCHEDULE_FREE_ADAMW" else None)
    return optimizer(value, decay)


def argument_of(name: str) -> Rule:
    """The rule of one argument of the optimizer."""
    return compute(
        lambda value, source: (
            dropped("off")
            if value in (False, None)
            else optimizer_argument(source.get("optimizer.optimizer"), name, value)
        ),
        "the same, or refused",
    )


def beta(index: int) -> Rule:
    """The rule of one beta of the optimizer."""

    def apply(value: Any, source: Source) -> Outcome:
        name = text(source.get("optimizer.optimizer"))
        betas = [0.9, 0.99 if name == "LION" else 0.999]
        betas[index] = number(value)
        return dropped("of another optimizer") if name == "ADAFACTOR" else optimizer_argument(name, "betas", betas)

    return compute(apply, "the same, or refused")


def schedule_of(value: Any, source: Source) -> Outcome:
    """The learning rate schedule."""
    name = text(value)
    factor = number(source.get("learning_rate_min_factor", 0))
    if name == "COSINE_WITH_RESTARTS":
        return refused(
            "OneTrainer's rises again as slowly as it falls; set train.lr_schedule = 'cosine_restarts', which falls as "
            "often and jumps back, or 'cosine'"
        )
    return schedule(name, source.get("learning_rate_cycles", 1), floor=factor)


def warmup_of(value: Any, source: Source) -> Outcome:
    """Warmup, in steps or as a share."""
    per_step = number(source.get("batch_size", 1)) * number(source.get("gradient_accumulation_steps", 1))
    return warmup(value, _length(source), _folders(source), max(per_step, 1))


def loss(value: Any, source: Source) -> Outcome:
    """The loss, a sum of kinds with their strengths."""
    strengths = {
        name: number(source.get(f"{name}_strength", float(name == "mse")))
        for name in ("mse", "mae", "log_cosh", "huber")
    }
    used = {name: strength for name, strength in strengths.items() if strength}
    if used == {"mse": 1}:
        return translated({"loss.kind": "mse"})
    if set(used) == {"huber"}:
        return translated({"loss.kind": "huber", "loss.huber_delta": number(source.get("huber_delta"))})
    return refused("sdlora has one loss, mse or huber; set loss.kind")


def weighting(value: Any, source: Source) -> Outcome:
    """The weight of the loss at each timestep."""
    strength = number(source.get("loss_weight_strength"))
    found: dict[str, dict[str, Any]] = {
        "CONSTANT": {"loss.weighting": "constant"},
        "MIN_SNR_GAMMA": {"loss.weighting": "min_snr", "loss.gamma": strength},
        "P2": {"loss.weighting": "p2", "loss.gamma": strength},
        "DEBIASED_ESTIMATION": {"loss.weighting": "debiased"},
    }
    name = text(value)
    return translated(found[name]) if name in found else refused(f"sdlora has no weighting {name}; set loss.weighting")


def timesteps(value: Any, source: Source) -> Outcome:
    """The distribution of timesteps."""
    if value == "UNIFORM":
        return translated({"timesteps.density": "uniform"})
    if value == "LOGIT_NORMAL":
        mean, spread_by = number(source.get("noising_bias", 0)), number(source.get("noising_weight", 0)) + 1
        return translated({"timesteps.density": "logit_normal", "timesteps.mean": mean, "timesteps.std": spread_by})
    return refused(f"sdlora has no distribution {text(value)}; set timesteps.density")


def ema(value: Any, source: Source) -> Outcome:
    """The moving average of the weights."""
    if value in (*OFF, "OFF"):
        return dropped("off")
    decay, interval = number(source.get("ema_decay")), max(number(source.get("ema_update_step_interval")), 1)
    remark = f"{decay:g} every {interval:g} steps, as a decay per step" if interval > 1 else ""
    return translated({"train.ema_decay": round(decay ** (1 / interval), 6)}, remark)


def masks(value: Any, source: Source) -> Outcome:
    """Masks in files."""
    if not flag(value):
        return dropped("off")
    floor = number(source.get("unmasked_weight"))
    return translated(
        {"data.masks": "file", "loss.mask_floor": floor}, "rename the masks from NAME-masklabel.png to NAME-mask.png"
    )


OF_SAMPLE = {
    "negative_prompt": "negative_prompt", "diffusion_steps": "num_steps", "cfg_scale": "guidance",
    "width": "width_px", "height": "height_px", "noise_scheduler": "sampler",
}  # fmt: skip
"""Our name of each setting of a sample beside its prompt and its seed."""


def samples(value: Any, source: Source) -> Outcome:
    """The prompts and seeds of previews."""
    rows = source.rows["samples"]
    options = previews(
        {
            "text": row.get("prompt", ""),
            "seeds": None if row.get("random_seed") else row.get("seed"),
            **{option: row.get(name) for name, option in OF_SAMPLE.items()},
        }
        for row in rows
    )
    others = dict.fromkeys(
        text(row["noise_scheduler"])
        for row in rows
        if row.get("noise_scheduler") and text(row["noise_scheduler"]).lower() not in SAMPLERS
    )
    remark = f"{', '.join(others)}: previews use the base model's own sampler, or one of preview.sampler"
    return translated(options, remark if others else "") if options else dropped("no prompts")


def sample_after(value: Any, source: Source) -> Outcome:
    """How often previews are drawn."""
    if text(source.get("sample_after_unit", "")) != "STEP":
        return dropped("sdlora draws previews from the base model and after every epoch")
    return every_steps(value, source)


def file_format(value: Any, source: Source) -> Outcome:
    """The naming of the tensors in the file."""
    name = text(value)
    if name == "DIFFUSERS_LORA":
        return translated({"file.format": "peft"})
    if name in ("KOHYA_LORA", "LEGACY_LORA", "SAFETENSORS"):
        return translated({"file.format": "kohya"})
    return refused("sdlora writes kohya's names and PEFT's; set file.format")
