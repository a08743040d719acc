"""A fresh adapter on a base model.

Used by the run, by estimates and by the copy check's benchmarks before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdlora.lora.inject import Adapter, AdapterSpec, inject
from sdlora.lora.targets import TEXT_ENCODER, find_targets
from sdlora.models.base import BaseModel


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapter to make.

    Attributes:
        targets: Names of targets, as `find_targets` takes them.
        rank: The adapter's rank, at least 1.
        alpha: Numerator of its scale, above 0.
        spec: Everything else that it is made of.
        seed: The run's seed, for the initialisation of A.
    """

    targets: Sequence[str]
    rank: int
    alpha: float
    spec: AdapterSpec
    seed: int


def make_adapter(settings: AdapterSettings, base: BaseModel) -> Adapter:
    """Inject a fresh adapter.

    Args:
        settings: Which adapter.
        base: Its UNet, and its text encoders where they are a target, are changed in place.

    Raises:
        ConfigError: A target matches no layer, or the initialisation needs more singular values than a layer has.
    """
    paths = find_targets(base.unet, settings.targets, base.text_encoders)
    text_is_trained = any(path.startswith(TEXT_ENCODER) for path in paths)
    texts = base.move_text_encoders() if text_is_trained else base.text_encoders
    return inject(
        base.unet, paths, settings.rank, settings.alpha, settings.seed, spec=settings.spec, text_encoders=texts
    )
