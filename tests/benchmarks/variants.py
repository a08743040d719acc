"""What the timestep benchmarks compare: one thing changed at a time, not every combination."""

from __future__ import annotations

from typing import Any

Recipe = dict[str, dict[str, Any]]
"""Settings by section, as in a configuration file."""

REFERENCE = "none"
COPY_VARIANTS = ("none", "image", "min_snr", "timestep_rank", "high_noise_keep", "debiased")


def variants(rank: int) -> dict[str, Recipe]:
    """All of them, in the order of the tables; everything below "image" has image coverage.

    Args:
        rank: The adapter's, of which "timestep_rank" keeps half at the highest noise, as in T-LoRA (2507.05964).
    """

    def image(**sections: Any) -> Recipe:
        return {"timesteps": {"coverage": "image"}, **sections}

    def density(name: str) -> Recipe:
        return {"timesteps": {"coverage": "image", "density": name}}

    return {
        "none": {"timesteps": {"coverage": "none"}},
        "batch": {"timesteps": {"coverage": "batch"}},
        "image": image(),
        **{name: density(name) for name in ("logit_normal", "cubic_high", "cubic_low", "speed")},
        **{name: image(loss={"weighting": name}) for name in ("min_snr", "soft_min_snr", "p2", "debiased")},
        "huber": image(loss={"kind": "huber"}),
        "high_noise_keep": {"timesteps": {"coverage": "image", "high_noise_keep": 0.5}},
        "timestep_rank": image(lora={"timestep_rank_min": max(1, rank // 2)}),
    }
