"""Everything that decides how an adapter is trained, as one value.

Made from a configuration by `sdlora.run.arguments`, and read by all parts of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdlora.diffusion.timesteps import Density

HuberSchedule = Literal["constant", "exponential", "snr"]
LrSchedule = Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial", "rex"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How an adapter is trained; what has an option's name has its meaning and its range.

    Attributes:
        density: How often each timestep is trained.
        text_is_trained: The adapter is on the text encoder, too.
        gamma: Parameter of the weighting; its default if None.
        text_encoder_factor: The text encoder's learning rate over the UNet's, above 0.
        rate_factors: Learning rates over the UNet's by selector of layers; the last that matches counts.
        ema_decay: 0 is off, as for `max_grad_norm`.
        class_words: Words in the trigger's place, for prior preservation; none if empty.
        checkpoint_every_steps: 0 for the end of epochs alone.
        preview_every_steps: 0 for none within an epoch.
    """

    seed: int

    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    density: Density
    coverage: str

    text_is_trained: bool

    kind: Literal["mse", "huber"]
    huber_delta: float
    huber_schedule: HuberSchedule
    weighting: str
    gamma: float | None
    mask_floor: float
    noise_offset: float
    noise_offset_random: bool
    multires_discount: float
    input_perturbation: float

    optimizer: str
    optimizer_args: Mapping[str, Any]
    learning_rate: float
    lr_schedule: LrSchedule
    lr_cycles: int
    lr_power: float
    lr_floor: float
    warmup_steps: float
    loraplus_lr_ratio: float
    text_encoder_factor: float
    text_encoder_epochs: int | None
    rate_factors: Mapping[str, float]
    weight_decay: float
    ema_decay: float
    max_weight_norm: float

    auto_batch: bool
    max_grad_norm: float
    gradient_checkpointing: bool
    compile: bool

    class_words: Sequence[str]
    preservation_weight: float
    preservation_every: int

    log_every_steps: int
    checkpoint_every_steps: int
    preview_every_steps: int
