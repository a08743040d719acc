"""Turns settings into arguments: the one place where a configuration becomes what the rooms below take.

Used by whatever starts from a configuration: the run, the cache, estimates and the studio.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdlora.config.schema import RunConfig
from sdlora.diffusion.timesteps import Density
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.models.load import LoadOptions
from sdlora.models.text import TextOptions
from sdlora.training.adapter import AdapterSettings
from sdlora.training.data import CaptionSettings
from sdlora.training.loss import LossSettings
from sdlora.training.optimizers import OptimizerSettings
from sdlora.training.prior_preservation import PriorSettings
from sdlora.training.schedule import ScheduleSettings
from sdlora.training.train_step import StepSettings
from sdlora.training.trainer import TrainingSettings


@dataclass(frozen=True)
class Arguments:
    """A configuration as arguments, made where they are asked for."""

    config: RunConfig

    @property
    def text_is_trained(self) -> bool:
        """Whether the adapter is on the text encoder, too."""
        return "text_encoder" in self.config.lora.targets

    @property
    def load_options(self) -> LoadOptions:
        """How the base model is loaded."""
        base = self.config.base
        text = TextOptions(base.clip_skip, self.config.data.max_token_windows)
        return LoadOptions(base.revision, base.variant, base.prediction_type, text, base.quantization)

    @property
    def adapter(self) -> AdapterSettings:
        """Which adapter is made."""
        lora = self.config.lora
        spec = AdapterSpec(
            target_ranks={str(target): rank for target, rank in lora.target_ranks.items()},
            target_alphas={str(target): alpha for target, alpha in lora.target_alphas.items()},
            rslora=lora.rslora,
            dora=lora.dora,
            dropout=lora.dropout,
            init=lora.init,
            timestep_rank=self.timestep_rank,
        )
        return AdapterSettings(lora.targets, lora.rank, lora.alpha, spec, self.config.seed)

    @property
    def timestep_rank(self) -> TimestepRank | None:
        """The ranks in use at each timestep, or None for all of them everywhere."""
        lora = self.config.lora
        if lora.timestep_rank_min is None:
            return None
        return TimestepRank(lora.timestep_rank_min, lora.timestep_rank_alpha)

    @property
    def captions(self) -> CaptionSettings:
        """What becomes of captions at an exposure."""
        data = self.config.data
        return CaptionSettings(
            shuffle_tags=data.shuffle_tags,
            keep_tags=data.keep_tags,
            dropout=data.caption_dropout,
            class_words=data.class_words,
            text_is_trained=self.text_is_trained,
            seed=self.config.seed,
        )

    @property
    def schedule(self) -> ScheduleSettings:
        """Which image is trained when, and at which timestep."""
        train, timesteps = self.config.train, self.config.timesteps
        density = Density(
            timesteps.density,
            mean=timesteps.mean,
            std=timesteps.std,
            minimum=timesteps.min,
            maximum=timesteps.max,
            high_noise_keep=timesteps.high_noise_keep,
        )
        return ScheduleSettings(
            epochs=train.epochs,
            batch_size=train.batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            density=density,
            coverage=timesteps.coverage,
            seed=self.config.seed,
        )

    @property
    def loss(self) -> LossSettings:
        """How predictions are compared with the target."""
        loss = self.config.loss
        return LossSettings(
            kind=loss.kind,
            huber_delta=loss.huber_delta,
            weighting=loss.weighting,
            gamma=loss.gamma,
            mask_floor=loss.mask_floor,
            noise_offset=loss.noise_offset,
            seed=self.config.seed,
        )

    @property
    def optimizer(self) -> OptimizerSettings:
        """Which optimizer, and its learning rates."""
        train = self.config.train
        return OptimizerSettings(
            name=train.optimizer,
            learning_rate=train.learning_rate,
            lr_schedule=train.lr_schedule,
            warmup_steps=train.warmup_steps,
            loraplus_lr_ratio=train.loraplus_lr_ratio,
            text_encoder_factor=(train.text_encoder_learning_rate or train.learning_rate) / train.learning_rate,
            weight_decay=train.weight_decay,
            ema_decay=train.ema_decay,
        )

    @property
    def training(self) -> TrainingSettings:
        """Everything that decides how the adapter is trained."""
        train = self.config.train
        return TrainingSettings(
            schedule=self.schedule,
            loss=self.loss,
            optimizer=self.optimizer,
            step=StepSettings(
                seed=self.config.seed,
                batch_size=train.batch_size,
                auto_batch=train.auto_batch,
                max_grad_norm=train.max_grad_norm,
                gradient_checkpointing=train.gradient_checkpointing,
                compile=train.compile,
            ),
            prior=PriorSettings(train.preservation_weight, train.preservation_every),
            log_every_steps=train.log_every_steps,
            checkpoint_every_steps=train.checkpoint_every_steps,
        )
