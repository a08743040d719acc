"""sd-scripts' settings that need more than a rename: functions of the table in `kohya`.

Each takes a value and all settings, and returns what becomes of it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdlora.common.files import read_text
from sdlora.config.imports import kohya_blocks
from sdlora.config.imports.lora_files import merged
from sdlora.config.imports.previews import previews
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
    spread,
    spread_steps,
    warmup,
)
from sdlora.config.kohya_folders import numbered
from sdlora.config.prompt_lines import SAMPLERS, read_line
from sdlora.config.schema_training import MAX_EPOCHS

PLAIN = ("networks.lora", "Standard", "Kohya LoCon")


def _folders(source: Source) -> tuple[list[TrainingFolder], list[TrainingFolder]] | str:
    """Training folders and regularisation folders; a sentence if they cannot be known."""
    rows = source.rows.get("", [])
    if rows:
        sets: tuple[list[TrainingFolder], list[TrainingFolder]] = ([], [])
        for row in rows:
            words = row.get("class_tokens")
            one = TrainingFolder(
                text(row.get("image_dir", "")), max(whole(row.get("num_repeats", 1)), 1), text(words) if words else None
            )
            sets[flag(row.get("is_reg"))].append(one)
        return sets
    folder, prior = source.get("train_data_dir"), source.get("reg_data_dir")
    if folder is None:
        return "no folder of images is given; set data.folder"
    found = numbered(Path(text(folder)).expanduser())
    if not found:
        return f"{folder!r} has no folders N_NAME with images on this computer"
    return _kohya(found), _prior(prior)


def _prior(prior: Any) -> list[TrainingFolder]:
    return _kohya(numbered(Path(text(prior)).expanduser())) if prior else []


def _kohya(found: list[tuple[Path, int, str]]) -> list[TrainingFolder]:
    """Folders N_NAME: N repeats, and NAME as the caption of images without one."""
    return [TrainingFolder(str(path), repeats, name) for path, repeats, name in found]


def _images_per_step(source: Source) -> float:
    batch = source.column("batch_size") or [source.get("train_batch_size", 1)]
    return max(whole(batch[0]) * whole(source.get("gradient_accumulation_steps", 1)), 1)


def length(source: Source) -> Length | str:
    """The length of a run; a sentence if it cannot be known."""
    found = _folders(source)
    folders, prior = found if not isinstance(found, str) else ([], [])
    if (epochs := source.get("max_train_epochs")) not in OFF:
        if isinstance(found, str):
            return _without_repeats(number(epochs), found)
        return spread(number(epochs), [one.repeats for one in folders])
    steps = number(source.get("max_train_steps", 1600))
    # Each step takes as many regularisation images as training images.
    share = 0.5 if prior else 1.0
    return spread_steps(steps, _images_per_step(source) * share, folders, f"max_train_steps = {steps:g}")


def _without_repeats(epochs: float, reason: str) -> Length | str:
    """The length in epochs where the repeats are given by names of folders that are elsewhere."""
    if epochs in range(1, MAX_EPOCHS + 1):
        return Length(int(epochs), [])
    return f"{reason}, so that the repeats are not known; set train.exposures to {epochs:g} times the highest N"


def length_of(value: Any, source: Source) -> Outcome:
    """The length in epochs."""
    found = length(source)
    return refused(found) if isinstance(found, str) else translated({"train.epochs": found.epochs}, found.remark)


def steps_of(value: Any, source: Source) -> Outcome:
    """The length in steps, where it is not given in epochs."""
    return dropped("max_train_epochs goes before it") if source.get("max_train_epochs") else length_of(value, source)


def data_of(value: Any, source: Source) -> Outcome:
    """The folders of training images with their repeats."""
    found = _folders(source)
    if isinstance(found, str):
        # Where training starts, the names of its subfolders give the repeats.
        folder = Path(text(value)).expanduser()
        given = {"data.folder": text(value)} if source.get("train_data_dir") else {}
        return (
            translated(given, found) if given and not folder.is_dir() else refused(f"{found}; set data.folder", given)
        )
    folders, _ = found
    if not folders or not all(one.folder for one in folders):
        return refused("no folder of training images is given; set data.folder")
    known = length(source) if source.values else None
    remark = "" if source.values else "options of training are sdlora's own; import the arguments that name this file"
    return translated(data_options(folders, known if isinstance(known, Length) else None), remark)


def reg(value: Any, source: Source) -> Outcome:
    """The folder of regularisation images with its weight."""
    rows = source.rows.get("", [])
    found = _folders(source)
    prior = found[1] if not isinstance(found, str) else _prior(source.get("reg_data_dir"))
    if rows and not prior:
        return dropped("off")
    if len(prior) != 1:
        return refused(
            "one folder of regularisation images is needed, and this is not exactly one on this computer; set "
            "data.preservation_folder and train.preservation_weight"
        )
    options: dict[str, Any] = {
        "data.preservation_folder": prior[0].folder,
        "train.preservation_weight": number(source.get("prior_loss_weight", 1.0)),
    }
    return translated(options | ({"data.preservation_caption": prior[0].caption} if prior[0].caption else {}))


def _parts(source: Source) -> tuple[bool, bool]:
    """Whether the UNet and the text encoder are trained."""
    rate = source.get("unet_lr")
    unet = not flag(source.get("network_train_text_encoder_only", False)) and (rate is None or number(rate) != 0)
    encoder = not flag(source.get("network_train_unet_only", False)) and any(_encoder_rates(source))
    return unet, encoder


def _encoder_rates(source: Source) -> list[float]:
    value = source.values.get("text_encoder_lr")
    if value in (None, "", []):
        return [number(source.get("learning_rate", 0))]
    parts = value if isinstance(value, list) else re.split(r"[,\s]+", text(value).strip("[] "))
    return [number(part) for part in parts]


def module(value: Any, source: Source) -> Outcome:
    """The kind of adapter, and the layers that get one."""
    name = text(value)
    if name not in PLAIN:
        return refused(
            f"sdlora trains plain LoRA, also of convolutions, and DoRA (lora.dora), not {name}; a plain LoRA of "
            "the same layers is the nearest",
            {"lora.targets": [*TRANSFORMER_BLOCKS, "text_encoder"] if _parts(source)[1] else TRANSFORMER_BLOCKS},
        )
    unet, encoder = _parts(source)
    conv = any(source.get(f"network_args.{key}") is not None for key in ("conv_dim", "conv_block_dims"))
    targets = [*(TRANSFORMER_BLOCKS if unet else []), *(["conv"] if conv and unet else [])]
    rates = _encoder_rates(source)
    one_of_two = [f"text_encoder_{place}" for place, rate in enumerate(rates, start=1) if rate] if 0 in rates else []
    texts = (one_of_two or ["text_encoder"]) if encoder else []
    return translated({"lora.targets": [*targets, *texts, *(kohya_blocks.excluded(source) if unet else [])]})


def base_weights(value: Any, source: Source) -> Outcome:
    """LoRAs that are merged into the base model, with the multiplier of each."""
    weights = source.get("base_weights_multiplier", [])
    return merged(value, weights if isinstance(weights, list) else [weights])


def alpha(value: Any, source: Source) -> Outcome:
    """Alpha, where 0 stands for the rank."""
    if number(value) == 0:
        return translated({"lora.alpha": whole(source.get("network_dim"))}, "0 means as much as the rank")
    return translated({"lora.alpha": number(value)})


def ranks_of(value: Any, source: Source) -> Outcome:
    """Ranks and alphas of convolutions and by block."""
    return kohya_blocks.ranks(value, source) if _parts(source)[0] else dropped("the UNet is not trained")


def rates_of(value: Any, source: Source) -> Outcome:
    """Learning rates by block, and those of two text encoders where they differ."""
    if not _parts(source)[0]:
        return dropped("the UNet is not trained")
    return kohya_blocks.rates(value, source, _own_rates(source))


def _own_rates(source: Source) -> dict[str, float]:
    """The second text encoder's rate, where it has one of its own."""
    rates = _encoder_rates(source)
    return {"text_encoder_2": rates[1]} if len(rates) > 1 and rates[1] not in (0, rates[0]) and rates[0] else {}


def plus_encoder(value: Any, source: Source) -> Outcome:
    """LoRA+'s ratio of the text encoder."""
    ratios = (source.get("network_args.loraplus_unet_lr_ratio"), source.get("network_args.loraplus_lr_ratio"))
    if not _parts(source)[1] or number(value) == number(ratios[0] or ratios[1] or 1):
        return dropped("as in the UNet")
    return refused("sdlora has one ratio for UNet and text encoder; set train.loraplus_lr_ratio")


def rate(value: Any, source: Source) -> Outcome:
    """The learning rate of whatever has none of its own."""
    if number(source.get("unet_lr", 0)):
        return dropped("unet_lr goes before it")
    return translated({"train.learning_rate": number(value)})


def unet_rate(value: Any, source: Source) -> Outcome:
    """The UNet's learning rate."""
    return (
        translated({"train.learning_rate": number(value)}) if number(value) else dropped("0: the UNet is not trained")
    )


def encoder_rate(value: Any, source: Source) -> Outcome:
    """The text encoders' learning rates."""
    rates = _encoder_rates(source)
    if not _parts(source)[1]:
        return dropped("the text encoder is not trained")
    if len(rates) > 2:
        return refused("sdlora's families have one text encoder or two; set train.target_learning_rates")
    if 0 in rates:
        return translated({"train.text_encoder_learning_rate": max(rates)}, "one of them is not trained")
    if own := _own_rates(source):
        outcome = kohya_blocks.rates(value, source, own)
        return replace(outcome, options={"train.text_encoder_learning_rate": rates[0], **outcome.options})
    return translated({"train.text_encoder_learning_rate": rates[0]})


def _optimizer_name(source: Source) -> Any:
    if flag(source.get("use_8bit_adam", False)):
        return "AdamW8bit"
    return "Lion" if flag(source.get("use_lion_optimizer", False)) else source.get("optimizer_type")


def optimizer_of(value: Any, source: Source) -> Outcome:
    """The optimizer."""
    name = _optimizer_name(source)
    relative = source.get("optimizer_args.relative_step", True)
    if text(name).lower() == "adafactor" and flag(relative):
        return refused(
            "sd-scripts' Adafactor chooses its steps itself unless it has relative_step=False; sdlora's takes "
            "train.learning_rate as it is, so set both"
        )
    return optimizer(name, source.get("optimizer_args.weight_decay"))


def argument_of(name: str) -> Rule:
    """The rule of one argument of the optimizer."""
    return compute(
        lambda value, source: optimizer_argument(_optimizer_name(source), name, value), "the same, or refused"
    )


def warmup_of(value: Any, source: Source) -> Outcome:
    """Warmup, in steps or as a share."""
    found = _folders(source)
    folders = found[0] if not isinstance(found, str) else []
    return warmup(value, length(source), folders, _images_per_step(source))


def clip_skip(value: Any, source: Source) -> Outcome:
    """The text encoder's layer."""
    if flag(source.get("sdxl", False)):
        return dropped("sd-scripts does not use it for SDXL, whose second to last layer is always read")
    return translated({"base.clip_skip": whole(value)}) if whole(value) else dropped("off")


def resolution_of(value: Any, source: Source) -> Outcome:
    """The resolution, or those of several datasets with the same images."""
    return resolutions(value) if isinstance(value, tuple) else resolution(value)


def edge_of(value: Any) -> int | None:
    """The edge of a square resolution; None if it is none."""
    try:
        found: int | None = resolution(value).options.get("data.resolution_px")
    except ValueError:
        return None
    return found


def tokens(value: Any, source: Source) -> Outcome:
    """The length of captions."""
    windows = {75: 1, 150: 2, 225: 3}.get(whole(value))
    if windows is None:
        return refused("sdlora reads windows of 75 tokens; set data.max_token_windows")
    return translated({"data.max_token_windows": windows})


def caption_extension(value: Any, source: Source) -> Outcome:
    """The suffix of captions' files."""
    if text(value).lstrip(".") in ("txt", "caption", "json"):
        return dropped("sdlora reads captions from NAME.txt, NAME.caption and NAME.json")
    return refused(
        f"sdlora reads captions from NAME.txt, NAME.caption and NAME.json; rename the files NAME{text(value)}"
    )


def separator(value: Any, source: Source) -> Outcome:
    """What separates tags."""
    return dropped("the comma, as in sdlora") if text(value).strip() == "," else refused("sdlora splits tags at commas")


def masks(value: Any, source: Source) -> Outcome:
    """Masks in alpha channels."""
    if not flag(value):
        return dropped("off")
    alpha = source.column("alpha_mask") or [source.get("alpha_mask", False)]
    if all(flag(one) for one in alpha):
        return translated({"data.masks": "alpha", "loss.mask_floor": 0.0})
    return refused("mask images: copy each beside its image as NAME-mask.png, and set data.masks = 'file'")


def validation(value: Any, source: Source) -> Outcome:
    """The share of validation images."""
    if number(value) == 0:
        return translated({"data.validation_split": False})
    remark = "2 to 4 images, and only where there are 20 or more; the share is not used"
    return translated({"data.validation_split": True}, remark)


def loss_type(value: Any, source: Source) -> Outcome:
    """The loss."""
    plain = text(value)
    if plain in ("l2", "mse"):
        return translated({"loss.kind": "mse"})
    schedule = text(source.get("huber_schedule", "snr"))
    if plain == "huber" and schedule in ("constant", "exponential", "snr"):
        delta = number(source.get("huber_c", 0.1)) * (
            number(source.get("huber_scale", 1.0)) if schedule == "constant" else 1
        )
        return translated(
            {"loss.kind": "huber", "loss.huber_delta": delta, "loss.huber_schedule": schedule},
            "the Huber loss itself, of which sd-scripts has a smooth form",
        )
    return refused(f"sdlora has the losses mse and huber, not {plain!r}; set loss.kind")


def multires(value: Any, source: Source) -> Outcome:
    """Noise of several resolutions: as many of them as an image has."""
    if not whole(value):
        return dropped("off")
    return translated(
        {"loss.multires_discount": number(source.get("multires_noise_discount", 0.3))},
        "of all resolutions down to one latent pixel, of which six are usual",
    )


def prompts(value: Any, source: Source) -> Outcome:
    """Prompts of previews: a file, or lines as the GUI has them."""
    given = text(value)
    lines = given.split("\n")
    if len(lines) == 1 and given.endswith((".txt", ".toml", ".json")):
        try:
            lines = read_text(Path(given)).split("\n") if given.endswith(".txt") else []
        except (OSError, ValueError):
            lines = []
        if not lines:
            return dropped(f"{given} cannot be read as lines of prompts; set preview.prompts")
    return sample_prompts(lines)


def sample_prompts(lines: list[str]) -> Outcome:
    """Preview options of lines such as "a cat --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 25"."""
    read = [read_line(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    samplers = [table["sampler"] for table, _ in read if table.get("sampler", "").lower() not in ("", *SAMPLERS)]
    others = dict.fromkeys([flag for _, unknown in read for flag in unknown] + [f"--ss {name}" for name in samplers])
    options = previews(table for table, _ in read)
    remark = f"{', '.join(others)} dropped: sdlora's previews have nothing of the kind" if others else ""
    return translated(options, remark) if options else dropped("no prompts")
