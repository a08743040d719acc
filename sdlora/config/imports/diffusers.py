"""diffusers' training scripts for LoRAs, from the command line that starts them.

One table over `rules` and `shared` for the four scripts of Stable Diffusion; `command` reads the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdlora.config.imports.rules import (
    OFF,
    Outcome,
    Rule,
    Source,
    always,
    compute,
    drop,
    dropped,
    flag,
    keys,
    number,
    part_of,
    refuse,
    refused,
    rename,
    switch,
    table,
    text,
    translated,
    whole,
)
from sdlora.config.imports.shared import (
    VAE,
    Length,
    TrainingFolder,
    base_path,
    count_images,
    data_options,
    optimizer,
    optimizer_argument,
    precision,
    resolution,
    schedule,
    spread,
    spread_steps,
    trackers,
    warmup,
)

FORM = "diffusers' script"
_COMMON: dict[str, Any] = {
    "rank": 4, "lr_scheduler": "constant", "lr_warmup_steps": 500, "optimizer": "AdamW", "mixed_precision": "no",
    "adam_weight_decay": 0.01, "learning_rate": 1e-4,
}  # fmt: skip
_IMAGES = {"train_batch_size": 16, "num_train_epochs": 100}
_DREAMBOOTH = {"train_batch_size": 4, "num_train_epochs": 1}
SCRIPTS: dict[str, dict[str, Any]] = {
    "train_text_to_image_lora.py": {**_COMMON, **_IMAGES, "resolution": 512},
    "train_text_to_image_lora_sdxl.py": {**_COMMON, **_IMAGES, "resolution": 1024},
    "train_dreambooth_lora.py": {**_COMMON, **_DREAMBOOTH, "resolution": 512, "learning_rate": 5e-4},
    "train_dreambooth_lora_sdxl.py": {
        **_COMMON,
        **_DREAMBOOTH,
        "resolution": 1024,
        "adam_weight_decay": 1e-4,
        "text_encoder_lr": 5e-6,
    },
}
"""The scripts' own defaults where sdlora's differ."""


def read(script: str, launcher: dict[str, Any], arguments: dict[str, Any]) -> Source:
    """The source of one of the scripts' arguments.

    Args:
        script: Its file name, one of `SCRIPTS`.
        launcher: The arguments of `accelerate launch`.
        arguments: The script's.
    """
    found = {f"launch.{key}": value for key, value in launcher.items()} | arguments
    # With a length in steps, or with the launcher's precision, the script's default does not count.
    given = {"num_train_epochs"} if "max_train_steps" in arguments else set()
    given |= {"mixed_precision"} if "mixed_precision" in launcher else set()
    defaults = {key: value for key, value in SCRIPTS[script].items() if key not in given}
    source = Source(f"{FORM} {script}", found, defaults=defaults)
    encoder = ["text_encoder"] if flag(arguments.get("train_text_encoder", False)) else []
    family = {"base.family": "sdxl"} if script.endswith("_sdxl.py") else {}
    source.always = [
        always("attention of the UNet", {"lora.targets": ["cross_attention", "self_attention", *encoder], **family}),
        always("no buckets, no validation images", {"data.buckets": False, "data.validation_split": False}),
    ]
    return source


def _folders(source: Source) -> list[TrainingFolder]:
    folder = source.get("instance_data_dir") or source.get("train_data_dir")
    prompt = source.get("instance_prompt")
    if folder is None:
        return []
    return [TrainingFolder(text(folder), max(whole(source.get("repeats", 1)), 1), text(prompt) if prompt else None)]


def _per_step(source: Source) -> float:
    return max(number(source.get("train_batch_size")) * number(source.get("gradient_accumulation_steps", 1)), 1)


def _length(source: Source) -> Length | str:
    folders = _folders(source)
    if (steps := source.get("max_train_steps")) is not None:
        return spread_steps(number(steps), _per_step(source), folders, f"max_train_steps = {steps}")
    epochs = number(source.get("num_train_epochs"))
    if not flag(source.get("with_prior_preservation", False)):
        return spread(epochs, [one.repeats for one in folders])
    # An epoch lasts until all class images have been seen, if there are more of them.
    images = count_images(folders[0].folder) if folders else None
    if images is None:
        return "an epoch lasts as long as its class images, and the images cannot be counted on this computer"
    of_class = count_images(text(source.get("class_data_dir", ""))) or whole(source.get("num_class_images", 100))
    factor = max(of_class / (images * folders[0].repeats), 1.0)
    found = spread(epochs * factor, [folders[0].repeats])
    return Length(found.epochs, found.repeats, f"an epoch takes {of_class} class images. {found.remark}".strip())


def _epochs(value: Any, source: Source) -> Outcome:
    if source.get("max_train_steps") is not None:
        return dropped("max_train_steps goes before it")
    return _steps(value, source)


def _steps(value: Any, source: Source) -> Outcome:
    found = _length(source)
    return refused(found) if isinstance(found, str) else translated({"train.epochs": found.epochs}, found.remark)


def _data(value: Any, source: Source) -> Outcome:
    folders, known = _folders(source), _length(source)
    remark = "captions beside the images go before it, and the script does not read any" if folders[0].caption else ""
    return translated(data_options(folders, known if isinstance(known, Length) else None), remark)


def _prior(value: Any, source: Source) -> Outcome:
    if not flag(value):
        return dropped("off")
    folder = source.get("class_data_dir")
    if folder is None:
        return refused("the folder of class images is not given; set data.preservation_folder")
    options = {
        "data.preservation_folder": text(folder),
        "train.preservation_weight": number(source.get("prior_loss_weight", 1.0)),
    }
    prompt = source.get("class_prompt")
    remark = "sdlora does not generate class images: the folder must hold them, or set data.class_words instead"
    return translated(options | ({"data.preservation_caption": text(prompt)} if prompt else {}), remark)


def _rank(value: Any, source: Source) -> Outcome:
    return translated({"lora.rank": whole(value), "lora.alpha": whole(value)}, "alpha is the rank in these scripts")


def _scaled(value: Any, source: Source) -> float:
    """The rate that is used: with scale_lr, times the images per step of one process."""
    return number(value) * (_per_step(source) if flag(source.get("scale_lr", False)) else 1)


def _rate(value: Any, source: Source) -> Outcome:
    remark = "times batch size and accumulation, by scale_lr" if flag(source.get("scale_lr", False)) else ""
    return translated({"train.learning_rate": _scaled(value, source)}, remark)


def _encoder_rate(value: Any, source: Source) -> Outcome:
    if not flag(source.get("train_text_encoder", False)):
        return dropped("the text encoder is not trained")
    return translated({"train.text_encoder_learning_rate": number(value)})


def _encoder_decay(value: Any, source: Source) -> Outcome:
    if not flag(source.get("train_text_encoder", False)):
        return dropped("the text encoder is not trained")
    return refused("sdlora has one weight decay; set train.weight_decay")


def _optimizer_name(source: Source) -> str:
    name = text(source.get("optimizer"))
    return "AdamW8bit" if flag(source.get("use_8bit_adam", False)) and name.lower() == "adamw" else name


def _optimizer(value: Any, source: Source) -> Outcome:
    return optimizer(_optimizer_name(source), source.get("adam_weight_decay"))


def _argument(name: str) -> Rule:
    def apply(value: Any, source: Source) -> Outcome:
        if name != "eps" and not _optimizer_name(source).lower().startswith("prodigy"):
            return dropped("only with Prodigy")
        return optimizer_argument(_optimizer_name(source), name, value)

    return compute(apply, "the same, or refused")


def _beta(index: int) -> Rule:
    def apply(value: Any, source: Source) -> Outcome:
        betas = [0.9, 0.999]
        betas[index] = number(value)
        return optimizer_argument(_optimizer_name(source), "betas", betas)

    return compute(apply, "the same, or refused")


def _warmup(value: Any, source: Source) -> Outcome:
    if source.get("lr_scheduler") == "constant":
        return dropped("the script's constant schedule has no warmup")
    return warmup(value, _length(source), _folders(source), _per_step(source))


def _launch_precision(value: Any, source: Source) -> Outcome:
    return dropped("the script's own goes before it") if source.values.get("mixed_precision") else precision(value)


def _num_images(value: Any, source: Source) -> Outcome:
    if source.get("validation_prompt") is None:
        return dropped("has no effect without validation_prompt")
    return translated({"preview.seeds": list(range(min(max(whole(value), 1), 64)))})


_HUB_DATA = "download the data set to a folder with metadata.jsonl, and set data.folder"

RULES: dict[str, Rule] = table(
    {
        "pretrained_model_name_or_path": compute(lambda value, source: base_path(value), "`base.path`"),
        "revision": rename("base.revision", text),
        "variant": rename("base.variant", text),
        "pretrained_vae_model_name_or_path": VAE,
        "prediction_type": rename("base.prediction_type", text),
        "tokenizer_name": refuse("sdlora uses the base model's own tokenizer"),
        "rank": compute(_rank, "`lora.rank`, `lora.alpha`"),
        "lora_dropout": rename("lora.dropout", number),
        "use_dora": rename("lora.dora", flag),
        "train_text_encoder": compute(
            lambda value, source: translated({}, "with the MLP, too") if flag(value) else dropped("off"),
            "`lora.targets`",
        ),
        "train_data_dir": compute(_data, "`data.folder`"),
        "instance_data_dir": compute(_data, "`data.folder`, `data.repeats`, `data.caption`"),
        keys("instance_prompt repeats"): part_of("instance_data_dir"),
        "with_prior_preservation": compute(_prior, "`data.preservation_folder`, `train.preservation_weight`"),
        keys("class_data_dir class_prompt prior_loss_weight"): part_of("with_prior_preservation"),
        keys("num_class_images sample_batch_size prior_generation_precision"): drop(
            "sdlora does not generate class images; see data.class_words"
        ),
        keys("dataset_name dataset_config_name"): refuse(_HUB_DATA),
        "image_column": refuse("sdlora reads file_name of metadata.jsonl", off=("", "image")),
        "caption_column": refuse("sdlora reads text of metadata.jsonl; rename the column", off=("", "text")),
        "max_train_samples": refuse("sdlora trains on all images of a folder; remove some"),
        "resolution": compute(lambda value, source: resolution(value), "`data.resolution_px`"),
        "center_crop": drop("sdlora always crops from the middle"),
        "random_flip": switch({"data.flip": True}, "mirrored at every second exposure, not by chance"),
        "image_interpolation_mode": drop("sdlora resizes with one high-quality filter"),
        keys("num_train_epochs"): compute(_epochs, "`train.epochs`, with `data.repeats`"),
        keys("max_train_steps"): compute(_steps, "`train.epochs`, with `data.repeats`, if images can be counted"),
        "train_batch_size": rename("train.batch_size", whole),
        "gradient_accumulation_steps": rename("train.gradient_accumulation_steps", whole),
        "gradient_checkpointing": rename("train.gradient_checkpointing", flag),
        "learning_rate": compute(_rate, "`train.learning_rate`"),
        "scale_lr": part_of("learning_rate"),
        "optimizer": compute(_optimizer, "`train.optimizer`, `train.weight_decay`"),
        keys("use_8bit_adam adam_weight_decay"): part_of("optimizer"),
        "adam_beta1": _beta(0),
        "adam_beta2": _beta(1),
        "adam_epsilon": _argument("eps"),
        "prodigy_beta3": _argument("beta3"),
        "prodigy_decouple": _argument("decouple"),
        "prodigy_use_bias_correction": _argument("use_bias_correction"),
        "prodigy_safeguard_warmup": _argument("safeguard_warmup"),
        "adam_weight_decay_text_encoder": compute(_encoder_decay, "dropped if it is not trained, otherwise refused"),
        "text_encoder_lr": compute(_encoder_rate, "`train.text_encoder_learning_rate`"),
        "lr_scheduler": compute(
            lambda value, source: schedule(value, source.get("lr_num_cycles", 1), power=source.get("lr_power", 1)),
            "`train.lr_schedule` with `train.lr_cycles`, `train.lr_power`",
        ),
        keys("lr_num_cycles lr_power"): part_of("lr_scheduler"),
        "lr_warmup_steps": compute(_warmup, "`train.warmup_steps`; dropped with a constant rate"),
        "max_grad_norm": rename("train.max_grad_norm", number),
        "mixed_precision": compute(lambda value, source: precision(value), "`train.precision`"),
        "launch.mixed_precision": compute(_launch_precision, "`train.precision`"),
        "seed": rename("seed", whole),
        "snr_gamma": compute(
            lambda value, source: translated({"loss.weighting": "min_snr", "loss.gamma": number(value)}),
            "`loss.weighting` = min_snr, `loss.gamma`",
        ),
        "noise_offset": rename("loss.noise_offset", number),
        "do_edm_style_training": refuse("sdlora does not train in the way of EDM"),
        "class_labels_conditioning": refuse("sdlora trains Stable Diffusion 1.x, 2.x and XL"),
        "validation_prompt": rename("preview.prompts", lambda value: [text(value)]),
        "num_validation_images": compute(_num_images, "`preview.seeds`"),
        "validation_epochs": drop("sdlora draws previews from the base model and after every epoch"),
        "validation_images": refuse("sdlora draws previews from prompts"),
        "output_dir": rename("name", lambda value: Path(text(value).replace("\\", "/").rstrip("/")).name),
        "output_kohya_format": rename("file.format", lambda value: "kohya" if flag(value) else "peft"),
        keys("checkpointing_steps checkpoints_total_limit"): drop(
            "sdlora saves every epoch, and a checkpoint to resume from"
        ),
        "resume_from_checkpoint": refuse("a run of another trainer cannot be resumed; start a new one"),
        keys("push_to_hub hub_token hub_model_id"): drop("upload a finished LoRA with `sdlora push`"),
        "report_to": compute(lambda value, source: trackers(value), "`train.trackers`"),
        keys("logging_dir debug_loss"): drop("sdlora writes metrics.jsonl, state.json and report.html"),
        keys("enable_xformers_memory_efficient_attention enable_npu_flash_attention"): drop(
            "attention needs no choice"
        ),
        keys("pre_compute_text_embeddings cache_dir dataloader_num_workers"): drop(
            "sdlora always caches, and needs no workers"
        ),
        keys("tokenizer_max_length text_encoder_use_attention_mask"): drop("of other model families"),
        keys("allow_tf32 local_rank"): drop("does not change the result"),
        keys("num_processes num_machines", "launch"): refuse(
            "sdlora's batch counts all processes; multiply train.batch_size, and start sdlora with torchrun",
            off=(*OFF, 1, "1"),
        ),
        keys(
            "config_file multi_gpu gpu_ids main_process_port num_cpu_threads_per_process machine_rank main_process_ip "
            "dynamo_backend cpu same_network use_deepspeed",
            "launch",
        ): drop("how processes are started does not change the result"),
    }
)
