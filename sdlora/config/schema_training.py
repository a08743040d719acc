"""The training sections of the schema: the loop, the timesteps and the loss.

Part of `schema`.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sdlora.common.selectors import check_selector
from sdlora.config.schema_data import Section

MAX_EPOCHS = 5
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedule_free", "muon")
"""Optimizers that have a name."""
Selector = Annotated[str, AfterValidator(check_selector)]
"""A selector of layers."""


def _known_optimizer(value: str) -> str:
    if value not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        near = difflib.get_close_matches(value, OPTIMIZERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{hint}give one of {', '.join(OPTIMIZERS)}, or a class as 'module:Class'")
    return value


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give whole steps, or a share of all steps below 1")
    return value if 0 < value < 1 else int(value)


class TrainConfig(Section):
    """The training loop: length, batches, optimizer, memory and checkpoints."""

    epochs: int = Field(4, ge=1, le=MAX_EPOCHS)
    """Passes over the training images, 1 to 5."""
    exposures: int | None = Field(None, ge=1, le=5000)
    """How often each image is seen in the whole run, spread over the epochs; it decides data.repeats. Of several sets
    the one with the most repeats is seen this often, the others in proportion."""
    batch_size: int = Field(1, ge=1, le=512)
    """Images per forward pass."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=512)
    """Batches per optimizer step."""
    auto_batch: bool = False
    """If the device runs out of memory, split every batch into smaller parts and continue; the result is the same."""
    optimizer: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    """The optimizer; adamw8bit needs a GPU and the bitsandbytes package. Any other one of torch is 'module:Class', such
    as 'torch.optim:NAdam'."""
    optimizer_args: dict[str, Any] = Field({})
    """Arguments of the optimizer other than its learning rate and weight decay, such as { betas = [0.9, 0.99] }; which
    it takes is in its library's documentation."""
    learning_rate: float = Field(2e-4, gt=0.0, le=1.0)
    """Peak learning rate; use 1 with prodigy, and about a third of AdamW's with lion."""
    loraplus_lr_ratio: float = Field(1.0, ge=1.0, le=100.0)
    """LoRA+: learning rate of B divided by that of A; 1 is plain LoRA."""
    text_encoder_learning_rate: float | None = Field(None, gt=0.0, le=1.0)
    """Learning rate of the text encoder's adapter; train.learning_rate if unset."""
    target_learning_rates: dict[Selector, Annotated[float, Field(gt=0.0, le=1.0)]] = Field({})
    """Learning rate of some layers where it differs, by what lora.targets takes, such as { up = 1e-4, text_encoder_2 =
    2e-5 }; the last that matches counts."""
    text_encoder_epochs: int | None = Field(None, ge=1, le=MAX_EPOCHS)
    """Epochs after which the text encoder's adapter stays as it is; to the end if unset."""
    max_weight_norm: float = Field(0.0, ge=0.0, le=1000.0)
    """Shrink every layer's update to this Frobenius norm after each step, as kohya's scale_weight_norms does; 1 is
    usual, 0 is off."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "rex"] = "constant"
    """Learning rate schedule after warmup: 'linear', 'cosine', 'polynomial' and 'rex' (which falls late) end at zero,
    'cosine_restarts' falls train.lr_cycles times."""
    lr_cycles: int = Field(3, ge=2, le=100)
    """With cosine_restarts, how often the learning rate falls."""
    lr_power: float = Field(2.0, gt=0.0, le=10.0)
    """With polynomial, the power of the share of steps that is left."""
    lr_floor: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of train.learning_rate below which no schedule falls."""
    warmup_steps: Annotated[float, AfterValidator(_steps_or_share)] = Field(0, ge=0.0)
    """Steps over which the learning rate rises from zero; below 1 a share of all steps."""
    weight_decay: float = Field(1e-2, ge=0.0, le=1.0)
    """Weight decay of A and B, which pulls the model towards the base model."""
    ema_decay: float = Field(0.0, ge=0.0, lt=1.0)
    """Decay of an exponential moving average (EMA) of the adapter, used for previews and files; 0 disables it."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Clip the gradient norm to this value; 0 disables clipping."""
    preservation_weight: float = Field(0.0, ge=0.0, le=100.0)
    """Weight of prior preservation in the loss, relative to 1 for the training images: keeps what the base model knows
    beside your subject, given by data.class_words or data.preservation_folder. Above 0, a step takes 2 to 2.5 times as
    long."""
    preservation_every: int = Field(1, ge=1, le=16)
    """With data.class_words, compare with the base model at one in this many exposures, and weight each comparison
    accordingly; at 4, a step takes a little more than half as long as at 1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen base model; 'auto' is bf16 on GPUs that support it, otherwise fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which needs far less memory and makes a step about a third slower."""
    compile: bool = False
    """Compile the UNet's transformer blocks with torch.compile; the result is the same. Needs a C++ compiler (on GPUs
    also Triton), and a minute or more once per image size. Meant for long runs on GPUs, where it has not been timed; on
    a CPU, a step is 2 to 4 % faster."""
    device: str = "auto"
    """Device to train on: 'auto', 'cpu', 'cuda', or one GPU such as 'cuda:1'."""
    log_every_steps: int = Field(10, ge=1, le=1000)
    """Steps between reads of the loss from the device, at most; a single process also reads it after two seconds."""
    checkpoint_every_steps: int = Field(0, ge=0)
    """Steps between checkpoints for --resume; 0 saves only at the end of every epoch."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field([])
    """Also report losses, rates, copies and previews to TensorBoard (in the run's folder) or Weights & Biases (online,
    previews included); their packages are installed separately."""

    @model_validator(mode="after")
    def _check_optimizer(self) -> TrainConfig:
        if self.optimizer == "schedule_free" and self.lr_schedule != "constant":
            raise ValueError("train.optimizer = 'schedule_free' requires train.lr_schedule = 'constant'")
        if self.optimizer == "schedule_free" and self.max_weight_norm > 0:
            raise ValueError("train.optimizer = 'schedule_free' averages the weights; set train.max_weight_norm to 0")
        if self.lr_cycles != 3 and self.lr_schedule != "cosine_restarts":
            raise ValueError("train.lr_cycles requires train.lr_schedule = 'cosine_restarts'")
        if self.lr_power != 2.0 and self.lr_schedule != "polynomial":
            raise ValueError("train.lr_power requires train.lr_schedule = 'polynomial'")
        if self.lr_floor > 0 and self.lr_schedule == "constant":
            raise ValueError("train.lr_floor has no effect on train.lr_schedule = 'constant'")
        if self.text_encoder_epochs is not None and self.text_encoder_epochs >= self.epochs:
            raise ValueError(
                f"train.text_encoder_epochs ({self.text_encoder_epochs}) has no effect unless it is below train.epochs "
                f"({self.epochs})"
            )
        if self.optimizer == "schedule_free" and self.ema_decay > 0:
            raise ValueError("train.optimizer = 'schedule_free' already averages the weights; set train.ema_decay to 0")
        if self.optimizer == "prodigy":
            if self.learning_rate < 0.01:
                raise ValueError(
                    f"train.learning_rate ({self.learning_rate:g}) multiplies the rate that prodigy estimates; set it "
                    "to 1"
                )
            rates = {self.text_encoder_learning_rate or self.learning_rate, *self.target_learning_rates.values()}
            if self.loraplus_lr_ratio != 1.0 or rates != {self.learning_rate}:
                raise ValueError(
                    "train.optimizer = 'prodigy' uses one learning rate for all parameters; set "
                    "train.loraplus_lr_ratio to 1 and leave train.text_encoder_learning_rate and "
                    "train.target_learning_rates unset"
                )
        return self


class TimestepsConfig(Section):
    """Which timesteps are trained, and how often."""

    density: Literal["auto", "uniform", "logit_normal", "cubic_high", "cubic_low", "speed"] = "auto"
    """Distribution that training timesteps are drawn from; 'auto' is uniform, or logit_normal where the base model
    matches flows. Such models shift both towards noise as their schedules do."""
    mean: float = Field(0.0, ge=-10.0, le=10.0)
    """Mean of logit_normal; values above 0 shift it towards noisier timesteps."""
    std: float = Field(1.0, gt=0.0, le=10.0)
    """Standard deviation of logit_normal."""
    min: int = Field(0, ge=0, le=999)
    """Lowest timestep that is trained."""
    max: int = Field(999, ge=0, le=999)
    """Highest (noisiest) timestep that is trained."""
    high_noise_keep: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the draws at timestep 800 and above that are kept; less than 1 puts more weight on details."""
    coverage: Literal["none", "batch", "image"] = "image"
    """How evenly timesteps are spread: independent draws ('none'), stratified within each batch ('batch'), or also over
    the exposures of each image ('image')."""

    @model_validator(mode="after")
    def _check_combination(self) -> TimestepsConfig:
        if self.min > self.max:
            raise ValueError(f"timesteps.min ({self.min}) must not be above timesteps.max ({self.max})")
        if self.density != "logit_normal" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("timesteps.mean and timesteps.std require timesteps.density = 'logit_normal'")
        if self.high_noise_keep < 1.0 and (self.min >= 800 or self.max < 800):
            raise ValueError(
                "timesteps.high_noise_keep has no effect unless timesteps.min is below 800 and timesteps.max is 800 or "
                "more"
            )
        return self


class LossConfig(Section):
    """The training loss and its weight at each timestep."""

    kind: Literal["mse", "huber"] = "mse"
    """Squared error ('mse'), or the Huber loss, which is less sensitive to outliers."""
    huber_delta: float = Field(0.1, gt=0.0, le=10.0)
    """With loss.kind = 'huber', errors above this count linearly."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    """With loss.kind = 'huber', how its delta falls from 1 without noise to loss.huber_delta at the noisiest timestep:
    not at all, exponentially, or with the signal-to-noise ratio."""
    weighting: Literal["constant", "min_snr", "soft_min_snr", "p2", "debiased"] = "constant"
    """Weight of the loss at each timestep."""
    gamma: float | None = Field(None, gt=0.0, le=100.0)
    """Gamma of min_snr and soft_min_snr (5 if unset) and of p2 (1 if unset)."""
    mask_floor: float = Field(0.1, ge=0.0, lt=1.0)
    """With data.masks, weight of the masked-out parts of an image; 0 ignores them."""
    noise_offset: float = Field(0.0, ge=0.0, le=1.0)
    """Strength of noise that shifts whole channels, which helps with very dark and very bright images."""
    noise_offset_random: bool = False
    """Draw the strength of the noise offset for every exposure, between 0 and loss.noise_offset."""
    multires_discount: float = Field(0.0, ge=0.0, lt=1.0)
    """Add noise of ever lower resolutions, each weaker by this factor, which learns large shapes and brightness; 0.3 is
    usual, 0 is off (multi-resolution noise)."""
    input_perturbation: float = Field(0.0, ge=0.0, le=1.0)
    """Strength of further noise in the network's input that it is not asked to predict, against overfitting; 0.1 in its
    paper."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise; only for base models with v-prediction."""

    @model_validator(mode="after")
    def _check_combination(self) -> LossConfig:
        if self.kind != "huber" and self.huber_delta != 0.1:
            raise ValueError("loss.huber_delta requires loss.kind = 'huber'")
        if self.kind != "huber" and self.huber_schedule != "constant":
            raise ValueError("loss.huber_schedule requires loss.kind = 'huber'")
        if self.noise_offset_random and self.noise_offset == 0:
            raise ValueError("loss.noise_offset_random has no effect unless loss.noise_offset is above 0")
        if self.gamma is not None and self.weighting not in ("min_snr", "soft_min_snr", "p2"):
            raise ValueError("loss.gamma requires loss.weighting = 'min_snr', 'soft_min_snr' or 'p2'")
        if self.zero_terminal_snr and self.weighting != "constant":
            raise ValueError(
                f"loss.zero_terminal_snr requires loss.weighting = 'constant': {self.weighting!r} gives the last "
                "timestep a weight of zero"
            )
        return self
