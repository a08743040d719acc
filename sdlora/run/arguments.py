"""Turns settings into arguments: the one place where a configuration becomes what the rooms below take.

Used by whatever starts from a configuration: the run, the cache, estimates and the studio.
"""

from __future__ import annotations

from dataclasses import fields

from sdlora.config.schema import RunConfig
from sdlora.diffusion.timesteps import Density
from sdlora.lora.inject import Adapter, AdapterSpec, inject
from sdlora.lora.targets import find_targets
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.models.base import BaseModel
from sdlora.training.settings import TrainingSettings


def text_is_trained(config: RunConfig) -> bool:
    """Whether the adapter is on the text encoder, too."""
    return "text_encoder" in config.lora.targets


def timestep_rank(config: RunConfig) -> TimestepRank | None:
    """The ranks in use at each timestep, or None for all of them everywhere."""
    lora = config.lora
    if lora.timestep_rank_min is None:
        return None
    return TimestepRank(lora.timestep_rank_min, lora.timestep_rank_alpha)


def adapter_spec(config: RunConfig) -> AdapterSpec:
    """The kind of adapter that is trained."""
    lora = config.lora
    return AdapterSpec(
        target_ranks={str(target): rank for target, rank in lora.target_ranks.items()},
        target_alphas={str(target): alpha for target, alpha in lora.target_alphas.items()},
        rslora=lora.rslora,
        dora=lora.dora,
        dropout=lora.dropout,
        init=lora.init,
        timestep_rank=timestep_rank(config),
    )


def make_adapter(config: RunConfig, base: BaseModel) -> Adapter:
    """Inject a fresh adapter into a base model's UNet, and into its text encoders where they are a target.

    Raises:
        ConfigError: A target matches no layer, or the initialisation needs more singular values than a layer has.
    """
    lora, spec = config.lora, adapter_spec(config)
    paths = find_targets(base.unet, lora.targets, base.text_encoders)
    texts = base.move_text_encoders() if text_is_trained(config) else base.text_encoders
    return inject(base.unet, paths, lora.rank, lora.alpha, config.seed, spec=spec, text_encoders=texts)


def training_settings(config: RunConfig) -> TrainingSettings:
    """How the adapter is trained: the options of the same names, and what is derived from others."""
    train, timesteps = config.train, config.timesteps
    values = {name: value for section in (config.data, train, config.loss) for name, value in section}
    values |= {
        "seed": config.seed,
        "density": Density(
            timesteps.density,
            mean=timesteps.mean,
            std=timesteps.std,
            minimum=timesteps.min,
            maximum=timesteps.max,
            high_noise_keep=timesteps.high_noise_keep,
        ),
        "coverage": timesteps.coverage,
        "text_is_trained": text_is_trained(config),
        "text_encoder_factor": (train.text_encoder_learning_rate or train.learning_rate) / train.learning_rate,
    }
    return TrainingSettings(**{field.name: values[field.name] for field in fields(TrainingSettings)})
