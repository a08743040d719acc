"""What all trainers have in common: lengths, folders, base models, optimizers, schedules and resolutions.

The tables' functions call these; each returns an outcome or the values of options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.common.bundled import IMAGE_SUFFIXES
from sdlora.config.imports.rules import (
    OFF,
    Outcome,
    Rule,
    Source,
    Status,
    compute,
    dropped,
    flag,
    number,
    refused,
    text,
    translated,
    whole,
)
from sdlora.config.schema_training import MAX_EPOCHS

MASK_SUFFIXES = ("-mask.png", "-masklabel.png", "-condlabel.png")
TRANSFORMER_BLOCKS = ["cross_attention", "self_attention", "mlp", "projection"]
MIN_SNR = compute(
    lambda value, source: (
        translated({"loss.weighting": "min_snr", "loss.gamma": number(value)}) if number(value) else dropped("off")
    ),
    "`loss.weighting` = min_snr, `loss.gamma`",
)


def unless_off(option: str) -> Rule:
    """A number above 0 is the option's."""
    return compute(
        lambda value, source: dropped("off") if value in OFF else translated({option: number(value)}), f"`{option}`"
    )


TAG_DROPOUT = unless_off("data.tag_dropout")
CAP = f"More than {MAX_EPOCHS} epochs make a LoRA reproduce its images"

# The optimizer, its library's own weight decay, and the arguments that sdlora gives it.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
_OPTIMIZERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 0.01, _ADAM),
    "adamw8bit": ("adamw8bit", 0.01, _ADAM),
    "prodigy": (
        "prodigy",
        0.0,
        {
            **_ADAM, "beta3": None, "d0": 1e-6, "d_coef": 1.0, "growth_rate": math.inf, "decouple": True,
            "use_bias_correction": True, "safeguard_warmup": True, "slice_p": 1, "fsdp_in_use": False,
        },
    ),
    "adafactor": (
        "adafactor",
        0.0,
        {
            "scale_parameter": False, "relative_step": False, "warmup_init": False, "clip_threshold": 1.0,
            "decay_rate": -0.8, "eps": (1e-30, 1e-3), "beta1": None,
        },
    ),
    "lion": ("lion", 0.0, {"betas": (0.9, 0.99)}),
    "adamwschedulefree": ("schedule_free", 0.0, {**_ADAM, "r": 0.0, "weight_lr_power": 2.0}),
}  # fmt: skip
_SAME_AS = {
    "pagedadamw8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "adamw8": "adamw8bit",
    "pagedadamw": "adamw",
    "pagedadamw32bit": "adamw",
    "schedule_free_adamw": "adamwschedulefree",
}
_REMARKS = {"prodigy": "sdlora's Prodigy always has bias correction and safeguard_warmup, as its authors advise"}


@dataclass(frozen=True)
class TrainingFolder:
    """One folder of images as another trainer names it; `caption` is that of images without one of their own."""

    folder: str
    repeats: float = 1
    caption: str | None = None
    trigger: str | None = None
    recursive: bool = False


@dataclass(frozen=True)
class Length:
    """How long a run is: epochs of ours, repeats of every folder, and a sentence on what changed."""

    epochs: int
    repeats: list[int]
    remark: str = ""


def count_images(folder: str, *, recursive: bool = False) -> int | None:
    """The number of images in a folder, masks left out; None if it is not on this computer or holds none."""
    return len(_files(folder, recursive=recursive)) or None


def _files(folder: str, *, recursive: bool) -> list[Path]:
    path = Path(folder).expanduser()
    try:
        files = [file for file in (path.rglob("*") if recursive else path.iterdir()) if file.is_file()]
    except (OSError, ValueError):
        return []
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return [file for file in images if not file.name.lower().endswith(MASK_SUFFIXES)]


def _counts(folders: Sequence[TrainingFolder]) -> list[int | None]:
    return [count_images(one.folder, recursive=one.recursive) for one in folders]


def spread(epochs: float, repeats: Sequence[float]) -> Length:
    """Another trainer's epochs and repeats as at most five epochs with the same exposures of each image.

    Where that is not possible, the number of epochs, 3 to 5 if there are as many exposures, with the smallest error is
    chosen.
    """
    wanted = [max(epochs * one, 1.0) for one in repeats] or [max(epochs, 1.0)]
    if epochs in range(1, MAX_EPOCHS + 1) and all(float(one).is_integer() and one >= 1 for one in repeats):
        return Length(int(epochs), [int(one) for one in repeats])

    def error(candidate: int) -> float:
        return max(abs(max(round(one / candidate), 1) * candidate / one - 1) for one in wanted)

    candidates = [5, 4, 3] if min(wanted) >= 3 else [3, 2, 1]
    best = min(candidates, key=error)
    found = [max(round(one / best), 1) for one in wanted]
    same = error(best) < 1e-9
    exposures = ", ".join(dict.fromkeys(f"{one:g}" for one in wanted))
    ours = "" if same else " become " + ", ".join(dict.fromkeys(f"{one * best}" for one in found))
    repeats_of_ours = ", ".join(map(str, dict.fromkeys(found)))
    remark = (
        f"{epochs:g} epochs become {best}, and repeats {repeats_of_ours}: exposures per image "
        f"{'stay the same' if same else 'are nearly the same'} ({exposures}{ours})."
    )
    return Length(best, found, f"{remark} {CAP}." if epochs > MAX_EPOCHS else remark)


def spread_steps(steps: float, images_per_step: float, folders: Sequence[TrainingFolder], what: str) -> Length | str:
    """A length in steps as epochs and repeats; a sentence on what to set if the images cannot be counted.

    Args:
        steps: Optimizer steps.
        images_per_step: Training images per optimizer step.
        folders: The folders of training images.
        what: The length as the file says it, such as "max_train_steps = 2000".
    """
    counts = _counts(folders)
    total = steps * images_per_step
    if not folders or None in counts:
        missing = [one.folder for one, count in zip(folders, counts, strict=True) if count is None]
        return (
            f"{what} are {total:g} exposures in all, and the images of {', '.join(map(repr, missing)) or 'the data'} "
            f"cannot be counted on this computer. Divide {total:g} by the number of your images, and set "
            "train.exposures to the result."
        )
    per_epoch = sum(count * one.repeats for count, one in zip(counts, folders, strict=True) if count)
    if per_epoch <= 0 or total <= 0:
        return f"{what} leave nothing to train; set train.exposures"
    images = sum(filter(None, counts))
    length = spread(total / per_epoch, [one.repeats for one in folders])
    exposures = f"{what} on {images} images are {total / images:.4g} exposures per image"
    remark = f"{exposures}: {length.epochs} epochs with {', '.join(map(str, dict.fromkeys(length.repeats)))} repeats."
    return Length(length.epochs, length.repeats, remark)


def num_steps(length: Length, folders: Sequence[TrainingFolder], images_per_step: float) -> int | None:
    """The optimizer steps of a run; None if its images cannot be counted."""
    counts = _counts(folders)
    exposures = sum(count * repeats for count, repeats in zip(counts, length.repeats, strict=True) if count)
    return math.ceil(exposures * length.epochs / images_per_step) if counts and None not in counts else None


def data_options(folders: Sequence[TrainingFolder], length: Length | None) -> dict[str, Any]:
    """The options of the training images' folders; without a length, with the repeats that the file gives."""
    repeats = length.repeats if length else [max(round(one.repeats), 1) for one in folders]
    if len(folders) == 1:
        found = {
            "data.folder": folders[0].folder,
            "data.repeats": repeats[0] if length or repeats[0] > 1 else None,
            "data.caption": folders[0].caption,
            "data.trigger": folders[0].trigger,
            "data.recursive": True if folders[0].recursive else None,
        }
        return {key: value for key, value in found.items() if value is not None}
    titles = [re.split(r"[/\\]", one.folder.rstrip("/\\"))[-1] for one in folders]
    sets = []
    for index, (one, count, title) in enumerate(zip(folders, repeats, titles, strict=True), start=1):
        name = f"{title} {index}" if titles.count(title) > 1 else None
        entry = {
            "folder": one.folder, "name": name, "repeats": count, "trigger": one.trigger, "caption": one.caption,
            "recursive": True if one.recursive else None,
        }  # fmt: skip
        sets.append({key: value for key, value in entry.items() if value is not None})
    return {"data.sets": sets}


def base_path(value: Any) -> Outcome:
    """The base model."""
    path = text(value)
    if path.lower().endswith((".ckpt", ".pt", ".bin")):
        return refused("sdlora reads .safetensors files, folders in diffusers' layout and Hub ids; convert the file")
    return translated({"base.path": path})


def _vae(value: Any, source: Source) -> Outcome:
    if value in OFF:
        return dropped("the base model's own")
    found = base_path(value)
    return translated({"base.vae": text(value)}) if found.status is Status.TRANSLATED else found


VAE = compute(_vae, "`base.vae`")
"""A VAE that replaces the base model's."""


def optimizer(name: Any, weight_decay: Any = None, remark: str = "") -> Outcome:
    """An optimizer by the name that other trainers give it.

    Args:
        name: In upper or lower case.
        weight_decay: What the file gives; the library's own if None.
        remark: What else differs.
    """
    plain = _plain(name)
    if plain not in _OPTIMIZERS:
        return refused(
            f"sdlora has no {text(name)}. Set train.optimizer to adamw, adamw8bit, prodigy, adafactor, lion or "
            "schedule_free, and train.learning_rate to go with it"
        )
    ours, decay, _ = _OPTIMIZERS[plain]
    given = decay if weight_decay is None else number(weight_decay)
    remarks = [_REMARKS.get(plain, ""), remark]
    return translated({"train.optimizer": ours, "train.weight_decay": given}, "; ".join(filter(None, remarks)))


def optimizer_argument(optimizer: Any, name: str, value: Any) -> Outcome:
    """An argument of an optimizer: dropped if sdlora gives it the same value."""
    plain = _plain(optimizer)
    if plain not in _OPTIMIZERS:
        return refused(f"sdlora has no {optimizer}")
    ours, _, known = _OPTIMIZERS[plain]
    if name not in known:
        return refused(f"sdlora does not know {name} of {ours}; see train.optimizer_args")
    if _same(value, known[name]):
        return dropped(f"what sdlora's {ours} has")
    return refused(f"sdlora's {ours} has {name} = {known[name]}; set train.optimizer_args")


def optimizer_arguments() -> list[str]:
    """The names of all arguments that sdlora knows of its optimizers."""
    return sorted({name for _, _, known in _OPTIMIZERS.values() for name in known})


def _plain(name: Any) -> str:
    lowered = text(name).lower().rpartition(".")[2]
    return _SAME_AS.get(lowered, lowered)


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, bool):
        return flag(value) is ours
    if isinstance(ours, tuple):
        parts = value if isinstance(value, list | tuple) else text(value).strip("()[] ").split(",")
        return len(parts) == len(ours) and all(_same(part, one) for part, one in zip(parts, ours, strict=True))
    if ours is None:
        return value in (None, "", "None", "null")
    return value is not None and math.isclose(float(text(value)), ours, rel_tol=1e-9)


def schedule(name: Any, cycles: Any = None, *, power: Any = 1, floor: Any = 0) -> Outcome:
    """A learning rate schedule by diffusers' names, or those of other trainers.

    Args:
        name: In upper or lower case.
        cycles: The number of restarts.
        power: Of the polynomial.
        floor: The share of the highest rate at which it ends.
    """
    plain = text(name).lower()
    if plain in ("constant", "constant_with_warmup"):
        return translated({"train.lr_schedule": "constant"})
    count = 1 if cycles in (None, "") else whole(cycles)
    end = {"train.lr_floor": number(floor)} if number(floor) else {}
    if plain in ("cosine", "cosine_with_min_lr"):
        return translated({"train.lr_schedule": "cosine"} | end)
    if plain in ("cosine_with_restarts", "cosine_with_hard_restarts"):
        if count <= 1:
            return translated({"train.lr_schedule": "cosine"} | end, "without restarts, it is the cosine")
        return translated({"train.lr_schedule": "cosine_restarts", "train.lr_cycles": count} | end)
    if plain == "linear" or (plain == "polynomial" and number(power) == 1):
        return translated({"train.lr_schedule": "linear"} | end)
    if plain == "polynomial":
        return translated({"train.lr_schedule": "polynomial", "train.lr_power": number(power)} | end)
    if plain == "rex":
        return translated({"train.lr_schedule": "rex"} | end, "the paper's curve, which falls a little earlier")
    return refused(f"sdlora has no schedule {plain!r}; set train.lr_schedule to 'cosine', the nearest, or 'constant'")


def resolution(value: Any) -> Outcome:
    """A resolution: a number, a text such as "1024,1024" or "512x768", or a list of width and height."""
    parts = value if isinstance(value, list) else re.split(r"[,xX]", text(value).strip("()[] "))
    edges = [whole(part) for part in parts]
    if len(edges) in (1, 2) and len(set(edges)) == 1:
        return translated({"data.resolution_px": edges[0]})
    if len(edges) == 2 and min(edges) > 0:
        area = round(math.sqrt(edges[0] * edges[1]))
        return refused(
            f"data.resolution_px is the edge of a square, and images keep their shape; {area} has the same area"
        )
    return refused("several resolutions are given; set data.resolutions_px")


def resolutions(values: Sequence[Any]) -> Outcome:
    """Several resolutions of one run, each the edge of a square."""
    edges = sorted({whole(value) for value in values})
    if len(edges) < 2:
        return resolution(list(values))
    return translated({"data.resolutions_px": edges}, "the exposures of each image have them in turn")


def precision(value: Any) -> Outcome:
    """The precision of the base model during training, by any trainer's name."""
    plain = text(value).lower()
    ours = {
        "no": "fp32", "fp32": "fp32", "float": "fp32", "float32": "fp32", "float_32": "fp32", "tfloat_32": "fp32",
        "fp16": "fp16", "float16": "fp16", "float_16": "fp16", "half": "fp16",
        "bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16",
    }.get(plain)  # fmt: skip
    if ours is None:
        return refused(f"sdlora trains in fp32, bf16 or fp16, not in {plain}; set train.precision")
    return translated({"train.precision": ours})


def trackers(value: Any) -> Outcome:
    """Where losses are reported to, by the names that Accelerate has."""
    given = value if isinstance(value, list) else text(value).split(",")
    found = ["tensorboard", "wandb"] if "all" in given else [name for name in ("tensorboard", "wandb") if name in given]
    if not found:
        return dropped("sdlora reports to TensorBoard and Weights & Biases, with train.trackers")
    return translated({"train.trackers": found})


def file_precision(value: Any) -> Outcome:
    """The precision of the stored weights, by any trainer's name."""
    found = precision(value)
    return translated({"file.precision": found.options["train.precision"]}) if found.options else found


def warmup(value: Any, length: Length | str, folders: Sequence[TrainingFolder], images_per_step: float) -> Outcome:
    """Warmup steps; a number below 1 is a share of all steps."""
    steps = number(value)
    if steps == 0 or steps >= 1:
        return translated({"train.warmup_steps": round(steps)})
    total = num_steps(length, folders, images_per_step) if isinstance(length, Length) else None
    if total is None:
        return translated({"train.warmup_steps": steps}, "a share of all steps")
    found = round(steps * total)
    return translated({"train.warmup_steps": found}, f"{steps:.3g} of {total} steps")
