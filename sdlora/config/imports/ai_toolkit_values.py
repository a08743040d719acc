"""ai-toolkit's settings that need more than a rename: functions of the table in `ai_toolkit`.

Each takes a value and all settings, and returns what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdlora.config.imports.previews import previews
from sdlora.config.imports.rules import (
    EMPTY,
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
)
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
    spread_steps,
)

_QUANTIZED = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "int8": "int8", "nf4": "nf4"}


def _folders(source: Source, *, regularisation: bool = False) -> list[TrainingFolder]:
    """The folders of images for training, or those for regularisation."""
    trigger = source.get("process.trigger_word")
    found = []
    for row in source.rows["process.datasets"]:
        folder = row.get("folder_path") or row.get("dataset_path")
        is_reg = flag(row.get("is_reg", False)) or flag(row.get("prior_reg", False))
        if folder not in EMPTY and is_reg is regularisation:
            words, caption = row.get("trigger_word") or trigger, row.get("default_caption")
            found.append(
                TrainingFolder(
                    text(folder),
                    max(whole(row.get("num_repeats") or 1), 1),
                    text(caption) if caption else None,
                    text(words) if words and not is_reg else None,
                )
            )
    return found


def _length(source: Source) -> Length | str:
    steps = number(source.get("process.train.steps"))
    per_step = number(source.get("process.train.batch_size", 1)) * number(
        source.get("process.train.gradient_accumulation", 1)
    )
    # Every second step takes regularisation images, if there are any.
    share = 0.5 if _folders(source, regularisation=True) else 1.0
    return spread_steps(steps, per_step * share, _folders(source), f"{steps:g} steps")


def steps(value: Any, source: Source) -> Outcome:
    """The length in steps."""
    found = _length(source)
    return refused(found) if isinstance(found, str) else translated({"train.epochs": found.epochs}, found.remark)


def data(value: Any, source: Source) -> Outcome:
    """The folders of training images with their repeats and trigger words."""
    folders = _folders(source)
    if not folders:
        return refused("no folder of training images is given; set data.folder")
    known = _length(source)
    options = data_options(folders, known if isinstance(known, Length) else None)
    placeholder = "sdlora does not replace [trigger] in captions" if any(one.trigger for one in folders) else ""
    return translated(options, placeholder)


def reg(value: Any, source: Source) -> Outcome:
    """The folder of regularisation images with its weight."""
    folders = _folders(source, regularisation=True)
    if not folders:
        return dropped("off")
    if len(folders) > 1:
        return refused("sdlora has one folder of regularisation images; set data.preservation_folder")
    options: dict[str, Any] = {
        "data.preservation_folder": folders[0].folder,
        "train.preservation_weight": number(source.get("process.train.reg_weight", 1.0)),
    }
    return translated(options | ({"data.preservation_caption": folders[0].caption} if folders[0].caption else {}))


def resolution_of(value: Any, source: Source) -> Outcome:
    """The resolution: one, or a list of those that every image is trained at."""
    return resolutions(value) if isinstance(value, list) else resolution(value)


def network_type(value: Any, source: Source) -> Outcome:
    """The kind of adapter, and the layers that get one."""
    name = text(value)
    if name not in ("lora", "locon", "dora"):
        return refused(f"sdlora trains plain LoRA, also of convolutions, and DoRA (lora.dora), not {name}")
    targets = list(TRANSFORMER_BLOCKS) if flag(source.get("process.train.train_unet", True)) else []
    conv = ["conv"] if source.get("process.network.conv") and targets else []
    encoder = ["text_encoder"] if flag(source.get("process.train.train_text_encoder", False)) else []
    dora = {"lora.dora": True} if name == "dora" else {}
    only, ignored = (_contains(source, key) for key in ("only_if_contains", "ignore_if_contains"))
    chosen = [*(only if only and targets else [*targets, *conv]), *encoder]
    return translated(
        {"lora.targets": [*chosen, *(f"!{pattern}" for pattern in ignored)], **dora}, "without the time embeddings"
    )


def _contains(source: Source, key: str) -> list[str]:
    """Parts of layers' names as patterns of their paths."""
    given = source.get(f"process.network.network_kwargs.{key}") or source.get(f"process.model.{key}") or []
    parts = given if isinstance(given, list) else [given]
    return [f"*{text(part).removeprefix('transformer.').removeprefix('unet.')}*" for part in parts]


def linear(value: Any, source: Source) -> Outcome:
    """Rank of all layers but convolutions; an older name goes before it."""
    if source.get("process.network.rank") is not None:
        return dropped("rank goes before it")
    return translated({"lora.rank": whole(value)})


def alpha(value: Any, source: Source) -> Outcome:
    """Alpha of all layers but convolutions; linear_alpha goes before alpha."""
    given = source.values.get("process.network.linear_alpha")
    return translated({"lora.alpha": number(source.get("process.network.alpha", value) if given is None else given)})


def conv(value: Any, source: Source) -> Outcome:
    """Rank and alpha of convolutions."""
    rank = whole(value)
    if not rank:
        return dropped("off")
    given = number(source.get("process.network.conv_alpha", rank))
    return translated({"lora.target_ranks": {"conv": rank}, "lora.target_alphas": {"conv": given}})


def arch(value: Any, source: Source) -> Outcome:
    """The model family."""
    families = {"sd1": "sd1", "sd15": "sd1", "sd2": "sd2", "sdxl": "sdxl"}
    name = text(value)
    if name not in families:
        return refused(f"sdlora trains Stable Diffusion 1.x, 2.x and XL, not {name}")
    return translated({"base.family": families[name]})


def v_prediction(value: Any, source: Source) -> Outcome:
    """Whether the base model predicts v."""
    if not flag(value):
        return dropped("off: the base model's files say what it predicts")
    return translated({"base.prediction_type": "v_prediction"})


def quantize(value: Any, source: Source) -> Outcome:
    """Quantization of the frozen weights."""
    if not flag(value):
        return dropped("off")
    kind = text(source.get("process.model.qtype", "qfloat8"))
    if kind not in _QUANTIZED:
        return refused(f"sdlora quantizes to int8, fp8 and nf4, not to {kind}; set base.quantization")
    return translated({"base.quantization": _QUANTIZED[kind]})


def accumulation(value: Any, source: Source) -> Outcome:
    """Batches per optimizer step: those of one of its steps times the steps per update."""
    each = whole(source.get("process.train.gradient_accumulation", 1))
    return translated(
        {"train.gradient_accumulation_steps": each * whole(source.get("process.train.gradient_accumulation_steps", 1))}
    )


def _used_rate(value: Any, source: Source) -> float:
    """The rate that the optimizer is given: Prodigy gets 1 for anything below 0.1."""
    found = number(value)
    return 1.0 if text(source.get("process.train.optimizer")).lower().startswith("prodigy") and found < 0.1 else found


def rate(value: Any, source: Source) -> Outcome:
    """The learning rate of whatever has none of its own."""
    if source.get("process.train.unet_lr") is not None:
        return dropped("unet_lr goes before it")
    return translated({"train.learning_rate": _used_rate(value, source)})


def unet_rate(value: Any, source: Source) -> Outcome:
    """The UNet's learning rate."""
    return translated({"train.learning_rate": _used_rate(value, source)})


def encoder_rate(value: Any, source: Source) -> Outcome:
    """The text encoders' learning rate."""
    if not flag(source.get("process.train.train_text_encoder", False)):
        return dropped("the text encoder is not trained")
    return translated({"train.text_encoder_learning_rate": _used_rate(value, source)})


def optimizer_of(value: Any, source: Source) -> Outcome:
    """The optimizer."""
    decay = source.get("process.train.optimizer_params.weight_decay")
    remark = "epsilon is 1e-8, and not ai-toolkit's 1e-6" if text(value).lower().startswith(("adam", "prodigy")) else ""
    return optimizer(value, decay, remark)


def argument_of(name: str) -> Rule:
    """The rule of one argument of the optimizer."""
    return compute(
        lambda value, source: optimizer_argument(source.get("process.train.optimizer"), name, value),
        "the same, or refused",
    )


def _floor(source: Source) -> float:
    lowest, rate = source.get("process.train.lr_scheduler_params.eta_min", 0), source.get("process.train.lr", 0)
    return number(lowest) / number(rate) if number(lowest) and number(rate) else 0.0


def schedule_of(value: Any, source: Source) -> Outcome:
    """The learning rate schedule; without a number, constant_with_warmup warms up for 1000 steps."""
    if "restarts" in text(value):
        return refused("ai-toolkit's restarts have a length in steps; set train.lr_schedule and train.lr_cycles")
    found = schedule(value, floor=_floor(source))
    given = source.get("process.train.lr_scheduler_params.num_warmup_steps")
    if text(value) == "constant_with_warmup" and given is None:
        return translated({**found.options, "train.warmup_steps": 1000})
    return found


def loss(value: Any, source: Source) -> Outcome:
    """The loss."""
    if value in ("mse", "l2"):
        return translated({"loss.kind": "mse"})
    return refused(f"sdlora has the losses mse and huber, not {text(value)}; set loss.kind")


def timesteps(value: Any, source: Source) -> Outcome:
    """Which timesteps are preferred: "content" is decided where there is more noise, "style" where there is less."""
    densities = {"balanced": "uniform", "content": "cubic_high", "style": "cubic_low"}
    name = text(value)
    if name not in densities:
        return refused(f"sdlora has no distribution {name}; set timesteps.density")
    return translated({"timesteps.density": densities[name]})


def masks(value: Any, source: Source) -> Outcome:
    """Masks in alpha channels."""
    if not flag(value):
        return dropped("off")
    floors = source.column("process.datasets.mask_min_value") or [0]
    floor = number(floors[0] or 0)
    return translated({"data.masks": "alpha", "loss.mask_floor": floor})


def preservation(value: Any, source: Source) -> Outcome:
    """Preservation of the base model's predictions for a class."""
    if not flag(value):
        return dropped("off")
    words = source.get("process.train.diff_output_preservation_class")
    if words is None:
        return refused("the class is not given; set data.class_words and train.preservation_weight")
    weight = number(source.get("process.train.diff_output_preservation_multiplier", 1.0))
    return translated(
        {"data.class_words": [text(words)], "train.preservation_weight": weight},
        "half of it where the class stands for the trigger word, and half for the empty caption",
    )


def blank(value: Any, source: Source) -> Outcome:
    """Preservation of the base model's predictions for the empty caption."""
    if not flag(value):
        return dropped("off")
    if flag(source.get("process.train.diff_output_preservation", False)):
        return dropped("a half of what data.class_words preserve")
    return refused("sdlora preserves the empty caption together with a class; set data.class_words")


def no_previews(value: Any, source: Source) -> Outcome:
    """Whether previews are left out."""
    if not flag(value):
        return dropped("off")
    return translated({"preview.enabled": False, "copycheck.enabled": False}, "the copy check needs previews")


def _with_trigger(prompt: Any, source: Source) -> str:
    return text(prompt).replace("[trigger]", text(source.get("process.trigger_word", ""))).strip()


OF_SAMPLE = {
    "neg": "negative_prompt", "guidance_scale": "guidance", "sample_steps": "num_steps", "width": "width_px",
    "height": "height_px", "seed": "seeds", "network_multiplier": "lora_scale",
}  # fmt: skip
"""Our name of each setting that a sample may have itself."""


def prompts(value: Any, source: Source) -> Outcome:
    """The prompts of previews, in a plain list."""
    given = value if isinstance(value, list) else [value]
    if source.rows.get("process.sample.samples"):
        return dropped("samples go before it")
    scale = source.get("process.sample.network_multiplier")
    return translated(previews({"text": _with_trigger(one, source), "lora_scale": scale} for one in given))


def samples(value: Any, source: Source) -> Outcome:
    """The prompts and seeds of previews, one table each."""
    rows = source.rows["process.sample.samples"]
    found = previews(
        {
            "text": _with_trigger(row.get("prompt", ""), source),
            # What a sample has not is taken from all; given here only where some samples have their own.
            **{
                option: row.get(name, source.get(f"process.sample.{name}"))
                for name, option in OF_SAMPLE.items()
                if source.column(f"process.sample.samples.{name}") or name == "network_multiplier"
            },
        }
        for row in rows
    )
    return translated(found) if found else dropped("no prompts")


def for_all(name: str, convert: Callable[[Any], Any], own: str) -> Rule:
    """The rule of a setting for all previews, before which those of single samples go."""

    def apply(value: Any, source: Source) -> Outcome:
        if source.column(f"process.sample.samples.{own}"):
            return dropped("the samples have their own")
        return translated({name: convert(value)})

    return compute(apply, f"`{name}`")


def seed(value: Any, source: Source) -> Outcome:
    """The seed of previews that have none of their own."""
    own = any(row.get("seed") not in EMPTY for row in source.rows.get("process.sample.samples", []))
    return dropped("the samples have seeds") if own else translated({"preview.seeds": [whole(value)]})


def ema(value: Any, source: Source) -> Outcome:
    """The moving average of the weights."""
    if not flag(value):
        return dropped("off")
    return translated({"train.ema_decay": number(source.get("process.train.ema_config.ema_decay"))})


def extras(path: Any, source: Source) -> Outcome:
    """Where a transformer in one file takes its other parts from."""
    if path in OFF or not text(source.get("process.model.name_or_path", "")).endswith(".safetensors"):
        return dropped("sdlora takes all parts from the base model")
    return translated({"base.components": text(path)})
