"""The schema: the one list of options, their defaults and their limits.

TOML files, `--set`, the app's form and the documentation are all made from these models, by `configfile`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sdlora.config.schema_data import DataConfig
from sdlora.config.schema_data import Section as _Section

MAX_EPOCHS = 5
Target = Literal["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"]


class BaseConfig(_Section):
    """Which model is adapted."""

    path: str = Field(
        "pocket",
        description="The base: 'pocket' (built in), a folder in diffusers' layout, a .safetensors checkpoint, or a hub "
        "id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id; the hub's default if unset.")
    variant: str | None = Field(
        None, description="Variant of the weight files, such as 'fp16'; the plain ones if unset."
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the base predicts, where its files do not tell; 'v_prediction' for 2.x at 768 px."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=24,
        description="Which layer of the text encoder is read, counted from the last (1); the family's own if unset.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Keep the weights of the UNet's attention blocks, most of a large base, in 8 or 4 bits instead of "
        "16 while training, which rounds them by about a hundredth or a tenth; previews show the base as it then is.",
    )


class LoraConfig(_Section):
    """The adapter."""

    rank: int = Field(8, ge=1, le=256, description="How much the adapter can hold; above 32 it copies images easily.")
    alpha: float = Field(8.0, gt=0.0, le=1024.0, description="Strength of the update: it is scaled by alpha / rank.")
    targets: list[Target] = Field(
        ["cross_attention"], min_length=1, description="Which layers get an adapter; several may be named."
    )
    target_ranks: dict[Target, Annotated[int, Field(ge=1, le=256)]] = Field(
        {}, description="Another rank for some of the targets, such as { mlp = 4 }."
    )
    target_alphas: dict[Target, Annotated[float, Field(gt=0.0, le=1024.0)]] = Field(
        {}, description="Another alpha for some of the targets."
    )
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(rank) instead of alpha / rank.")
    dora: bool = Field(
        False, description="Train every output's magnitude apart from its direction (DoRA); fewer programs read it."
    )
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Share of an adapter's inputs set to zero while training.")
    init: Literal["gaussian", "orthogonal", "pissa"] = Field(
        "gaussian",
        description="Where A and B start: A random and B zero, or singular vectors of a random matrix or of the "
        "layer's own weights, whose product is then subtracted.",
    )
    timestep_rank_min: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Use fewer ranks at high noise, down to this many at the highest (T-LoRA); all ranks if unset.",
    )
    timestep_rank_alpha: float = Field(
        1.0, gt=0.0, le=10.0, description="How fast ranks fall away with noise under timestep_rank_min; 1 is linear."
    )

    def ranks(self, *, unet_only: bool = False) -> list[int]:
        """The rank of each target's layers; the text encoder is no part of the UNet."""
        return [
            self.target_ranks.get(target, self.rank)
            for target in self.targets
            if not (unet_only and target == "text_encoder")
        ]

    @field_validator("targets")
    @classmethod
    def _no_duplicates(cls, value: list[Target]) -> list[Target]:
        if len(set(value)) < len(value):
            raise ValueError("a target is named twice")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> LoraConfig:
        unused = [
            f"lora.{name}.{target}"
            for name in ("target_ranks", "target_alphas")
            for target in getattr(self, name)
            if target not in self.targets
        ]
        if unused:
            raise ValueError(f"{', '.join(unused)}: not among lora.targets ({', '.join(self.targets)})")
        if self.timestep_rank_min is None and self.timestep_rank_alpha != 1.0:
            raise ValueError("lora.timestep_rank_alpha does nothing unless lora.timestep_rank_min is set")
        lowest = min(self.ranks(unet_only=True), default=0)
        if self.timestep_rank_min is not None and self.timestep_rank_min >= lowest:
            where = (
                f"the lowest rank of the UNet's layers ({lowest})" if lowest else "nothing: no target is in the UNet"
            )
            raise ValueError(f"lora.timestep_rank_min ({self.timestep_rank_min}) must be below {where}")
        if self.dora and (self.timestep_rank_min is not None or self.init != "gaussian"):
            raise ValueError("lora.dora goes with lora.init = 'gaussian' and without lora.timestep_rank_min")
        return self


class TrainConfig(_Section):
    """How it is trained."""

    epochs: int = Field(4, ge=1, le=MAX_EPOCHS, description="Passes over the set, 1 to 5.")
    batch_size: int = Field(1, ge=1, le=512, description="Images per forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=512, description="Batches per optimizer step.")
    auto_batch: bool = Field(
        False,
        description="When the device's memory is full, compute smaller parts of every batch and go on, to the same "
        "result.",
    )
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedule_free"] = Field(
        "adamw", description="Which optimizer; adamw8bit needs a GPU and the package bitsandbytes."
    )
    learning_rate: float = Field(
        2e-4, gt=0.0, le=1.0, description="The highest learning rate; 1 for prodigy, about a third for lion."
    )
    loraplus_lr_ratio: float = Field(
        1.0, ge=1.0, le=100.0, description="LoRA+: the learning rate of B over that of A; 1 is plain LoRA."
    )
    text_encoder_learning_rate: float | None = Field(
        None, gt=0.0, le=1.0, description="Another learning rate for the text encoder's adapter; the same if unset."
    )
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="The learning rate after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from zero.")
    weight_decay: float = Field(
        1e-2, ge=0.0, le=1.0, description="Decay of A and B towards zero, where zero is the base."
    )
    ema_decay: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Keep a moving average of the adapter with this decay, for previews and files; 0 is off.",
    )
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients longer than this are shortened to it; 0 is off.")
    preservation_weight: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="How much it counts, beside 1 for the set, that what is beside your subject stays as the base "
        "knows it; data.class_words or data.preservation_folder say what. Above 0 a step takes two to two and a half "
        "times as long.",
    )
    preservation_every: int = Field(
        1,
        ge=1,
        le=16,
        description="Of data.class_words: compare with the base model at one in this many exposures, each of which "
        "then counts as many times; at 4 a step takes little more than half as long as at 1.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="What the frozen base computes in; auto is bf16 on GPUs that have it, else fp32."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute parts of every step twice to need far less memory; a step takes about a third longer.",
    )
    compile: bool = Field(
        False,
        description="Let torch compile the UNet's transformer blocks, which learns the same. It needs a C++ compiler "
        "(on GPUs Triton too) and a minute or more for every size of image, once. Meant for long runs on GPUs, "
        "though it was never timed on one; on a CPU a step takes 2 to 4 % less.",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', or 'cuda:1'.")
    log_every_steps: int = Field(10, ge=1, le=1000, description="Losses are read back from the device this often.")
    checkpoint_every_steps: int = Field(
        0, ge=0, description="Save the state for --resume this often; 0 saves at the end of every epoch only."
    )

    @model_validator(mode="after")
    def _optimizer_fits(self) -> TrainConfig:
        if self.optimizer == "schedule_free" and self.lr_schedule != "constant":
            raise ValueError("train.optimizer = 'schedule_free' goes with train.lr_schedule = 'constant'")
        if self.optimizer == "schedule_free" and self.ema_decay > 0:
            raise ValueError("train.optimizer = 'schedule_free' averages by itself; set train.ema_decay to 0")
        if self.optimizer == "prodigy":
            if self.learning_rate < 0.01:
                raise ValueError(
                    f"train.learning_rate ({self.learning_rate:g}) multiplies the rate that prodigy finds; set it to 1"
                )
            if self.loraplus_lr_ratio != 1.0 or self.text_encoder_learning_rate not in (None, self.learning_rate):
                raise ValueError(
                    "train.optimizer = 'prodigy' has one learning rate for everything: "
                    "train.loraplus_lr_ratio must be 1 and train.text_encoder_learning_rate unset"
                )
        return self


class TimestepsConfig(_Section):
    """Which noise levels are trained."""

    density: Literal["uniform", "logit_normal", "cubic_high", "cubic_low", "speed"] = Field(
        "uniform", description="How much each noise level is trained."
    )
    mean: float = Field(0.0, ge=-10.0, le=10.0, description="Of logit_normal: above 0 is towards high noise.")
    std: float = Field(1.0, gt=0.0, le=10.0, description="Of logit_normal: how wide it is.")
    min: int = Field(0, ge=0, le=999, description="The lowest noise level that is trained.")
    max: int = Field(999, ge=0, le=999, description="The highest noise level that is trained.")
    high_noise_keep: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the draws from 800 up that is kept, for more of the details."
    )
    coverage: Literal["none", "batch", "image"] = Field(
        "image",
        description="How evenly exposures fall over noise levels: by chance, spread inside a batch, or spread over "
        "every image's own exposures too.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TimestepsConfig:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}); exchange them")
        if self.density != "logit_normal" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("timesteps.mean and timesteps.std belong to timesteps.density = 'logit_normal'")
        if self.high_noise_keep < 1.0 and (self.min >= 800 or self.max < 800):
            raise ValueError("timesteps.high_noise_keep does nothing unless timesteps.min to max reaches across 800")
        return self


class LossConfig(_Section):
    """What counts as an error, and how much at which noise level."""

    kind: Literal["mse", "huber"] = Field("mse", description="Squared error, or Huber's, which is lenient to outliers.")
    huber_delta: float = Field(0.1, gt=0.0, le=10.0, description="Of huber: errors above this count linearly.")
    weighting: Literal["constant", "min_snr", "soft_min_snr", "p2", "debiased"] = Field(
        "constant", description="How much the loss weighs at each noise level."
    )
    gamma: float | None = Field(
        None, gt=0.0, le=100.0, description="Of min_snr and soft_min_snr (5 if unset) and p2 (1 if unset)."
    )
    mask_floor: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="Of data.masks: how much the hidden parts of an image count, 0 for not at all.",
    )
    noise_offset: float = Field(
        0.0, ge=0.0, le=1.0, description="Noise that shifts whole channels, for very dark and very bright images."
    )
    zero_terminal_snr: bool = Field(
        False, description="Rescale the schedule so that the highest level is pure noise; v-prediction bases only."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.kind != "huber" and self.huber_delta != 0.1:
            raise ValueError("loss.huber_delta belongs to loss.kind = 'huber'")
        if self.gamma is not None and self.weighting not in ("min_snr", "soft_min_snr", "p2"):
            raise ValueError("loss.gamma belongs to loss.weighting = 'min_snr', 'soft_min_snr' or 'p2'")
        if self.zero_terminal_snr and self.weighting != "constant":
            raise ValueError(
                f"loss.weighting = {self.weighting!r} gives pure noise, which loss.zero_terminal_snr trains, no weight "
                "at all; use 'constant'"
            )
        return self


class PreviewConfig(_Section):
    """The images drawn after every epoch."""

    enabled: bool = Field(True, description="Draw previews of the base and after every epoch.")
    prompts: list[str] = Field(
        [], description="What to draw that is in no caption; three made of the trigger and other places if empty."
    )
    num_captions: int = Field(
        3, ge=0, le=64, description="So many captions of the set are drawn as well, where copies show first."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        [0, 1], min_length=1, description="Every prompt is drawn once per seed."
    )
    negative_prompt: str = Field("", description="What guidance steers away from.")
    num_steps: int = Field(25, ge=1, le=1000, description="Denoising steps per preview.")
    guidance: float = Field(7.5, ge=1.0, le=50.0, description="Guidance scale; 1 switches guidance off.")


class CopyCheckConfig(_Section):
    """Whether previews are copies of training images."""

    enabled: bool = Field(True, description="Compare the previews of every epoch with the training images.")
    stop: bool = Field(False, description="End training at the first epoch that copies; all files are kept.")
    sscd: bool = Field(
        False, description="Ask SSCD as well, a network that was trained to find copies; it comes from the hub."
    )
    dinov2: bool = Field(
        False, description="Choose the epoch by how much DINOv2, from the hub, finds the concept in the previews."
    )

    @model_validator(mode="after")
    def _enabled(self) -> CopyCheckConfig:
        used = [name for name in ("stop", "sscd", "dinov2") if getattr(self, name)]
        if used and not self.enabled:
            raise ValueError(f"copycheck.{used[0]} does nothing unless copycheck.enabled is true")
        return self


class FileConfig(_Section):
    """The LoRA file that a run leaves, and what is said beside it."""

    format: Literal["kohya", "peft"] = Field(
        "kohya", description="Whose names it has: kohya's, which all programs read, or PEFT's, for diffusers and PEFT."
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="How its numbers are stored; fp16 halves the file and rounds them."
    )
    thumbnail: bool = Field(True, description="Put a small preview, of no caption and no copy, into the file.")
    licence: str | None = Field(
        None, pattern=r"^[a-z0-9.-]+$", description="The licence in the model card, by the Hub's name: 'cc-by-4.0'."
    )
    include_captions: bool = Field(
        False,
        description="Tell captions and the folders' names in the file and the model card; else they stay yours.",
    )


class CacheConfig(_Section):
    """Where encoded images and captions are kept between runs."""

    dir: str | None = Field(None, description="The cache's folder; the user's own cache folder if unset.")
    max_text_gib: float = Field(
        2.0,
        ge=0.0,
        le=1000.0,
        description="Encoded captions take up to so much disk and memory; if shuffled tags make more, captions are "
        "encoded at every exposure instead, with the same result.",
    )


class RunConfig(_Section):
    """A whole run."""

    name: str | None = Field(
        None, pattern=r"^[\w][\w. -]{0,99}$", description="The LoRA's name; the configuration's file name if unset."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random is a function of this number.")
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    timesteps: TimestepsConfig = TimestepsConfig()
    loss: LossConfig = LossConfig()
    preview: PreviewConfig = PreviewConfig()
    copycheck: CopyCheckConfig = CopyCheckConfig()
    file: FileConfig = FileConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _text_encoder_rate_is_used(self) -> RunConfig:
        if self.train.text_encoder_learning_rate is not None and "text_encoder" not in self.lora.targets:
            raise ValueError("train.text_encoder_learning_rate needs 'text_encoder' among lora.targets")
        return self

    @model_validator(mode="after")
    def _check_has_previews(self) -> RunConfig:
        used = [name for name in ("stop", "sscd", "dinov2") if getattr(self.copycheck, name)]
        if used and not self.preview.enabled:
            raise ValueError(f"copycheck.{used[0]} needs preview.enabled: what is checked are the previews")
        return self

    @model_validator(mode="after")
    def _floor_has_masks(self) -> RunConfig:
        if self.loss.mask_floor != 0.1 and self.data.masks == "none":
            raise ValueError("loss.mask_floor does nothing unless data.masks is 'alpha' or 'file'")
        return self

    @model_validator(mode="after")
    def _compiled_is_plain(self) -> RunConfig:
        if self.train.compile and self.lora.dropout > 0:
            raise ValueError("train.compile goes with lora.dropout = 0: what is dropped is drawn anew in every step")
        if self.train.compile and self.base.quantization != "none":
            raise ValueError("train.compile goes with base.quantization = 'none': it would keep the weights unpacked")
        return self

    @model_validator(mode="after")
    def _preservation_is_whole(self) -> RunConfig:
        data, weight = self.data, self.train.preservation_weight
        ways = [name for name in ("class_words", "preservation_folder") if getattr(data, name)]
        if weight > 0 and len(ways) != 1:
            raise ValueError(
                "train.preservation_weight needs to know what is preserved: either data.class_words (no images "
                "needed) or data.preservation_folder (images of your own)"
            )
        if ways and weight == 0:
            raise ValueError(f"data.{ways[0]} does nothing unless train.preservation_weight is above 0")
        if data.class_words and not all(one.trigger for one in data.sets):
            raise ValueError("data.class_words stand in the trigger's place: set data.trigger, or one in every set")
        if self.train.preservation_every > 1 and not data.class_words:
            raise ValueError("train.preservation_every does nothing unless data.class_words says what is preserved")
        if data.preservation_caption and not data.preservation_folder:
            raise ValueError("data.preservation_caption belongs to data.preservation_folder")
        return self
