"""How much room a run needs on the disk, known before it begins.

Used by `run`. The estimate is an upper bound of what is large; small files are covered by a margin.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sdlora.copycheck.null_distribution import MIN_DRAWN, SIZE
from sdlora.errors import DiskFullError
from sdlora.run.setup import Parts
from sdlora.training.checkpoint import KEPT

_FLOAT_BYTES = 4
_MARGIN_BYTES = 2_000_000
# Tensors of a parameter's size in an optimizer's state: prodigy has its start and its numerator as well.
_STATES = {"prodigy": 4}
_OTHER_STATES = 2


def check_room(parts: Parts, *, resume: bool) -> None:
    """See whether a run's files, and what it will add to the cache, fit onto their disks.

    Args:
        parts: The run's.
        resume: Its cache is filled, and a part of its files is there.

    Raises:
        DiskFullError: They do not; it tells how much is needed and how much there is.
    """
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    needs = [("the run's folder", parts.folder.path, max(0, run_bytes(parts) - _used(parts.folder.path)))]
    if not resume:
        needs.append(("the cache", parts.data.cache.folder, cache_bytes(parts)))
    for what, path, num_bytes in needs:
        place = _existing(path)
        disks.setdefault(place.stat().st_dev, []).append((what, place, num_bytes))
    for found in disks.values():
        free, needed = shutil.disk_usage(found[0][1]).free, sum(num_bytes for *_, num_bytes in found) + _MARGIN_BYTES
        if free < needed:
            what = " and ".join(name for name, *_ in found)
            raise DiskFullError(
                f"The disk of {what} ({found[0][1]}) has {_mb(free)} left, and the run needs up to {_mb(needed)}. Free "
                "some space, or choose another --output or cache.dir."
            )


def run_bytes(parts: Parts) -> int:
    """What a run's folder will hold at most, in bytes."""
    config = parts.config
    adapter = parts.adapter.num_parameters() * _FLOAT_BYTES
    frozen = sum(start.numel() for start in parts.adapter.initial_factors()) * _FLOAT_BYTES
    copies = 1 + _STATES.get(config.train.optimizer, _OTHER_STATES) + (1 if config.train.ema_decay > 0 else 0)
    # A new checkpoint, LoRA or page is whole before an old one goes.
    checkpoints = (KEPT + 1) * (copies * adapter + frozen)
    loras = (config.train.epochs + 2) * (adapter + frozen)
    drawn = 0
    if parts.previews is not None:
        # Single images, the sheet twice, and the page, where they stand in text, twice.
        num_images = len(parts.previews.wanted()) * (config.train.epochs + 1)
        drawn = 6 * num_images * 3 * parts.base.resolution_px**2
    return checkpoints + loras + drawn


def cache_bytes(parts: Parts) -> int:
    """What a run may add to the cache at most, in bytes."""
    examples = [*parts.data.dataset.examples, *(parts.validation.data.dataset.examples if parts.validation else ())]
    unet = parts.base.unet.config
    # Mean and log-variance of every latent.
    latents = sum(
        2 * unet.in_channels * (e.bucket[0] // parts.base.latent_factor) * (e.bucket[1] // parts.base.latent_factor)
        for e in examples
    )
    # Shuffled tags may make another caption at every exposure.
    epochs, shuffled = parts.config.train.epochs, parts.config.data.shuffle_tags
    num_captions = sum(epochs * e.repeats if shuffled else 1 for e in examples)
    text = 2 * num_captions * parts.base.max_tokens * unet.cross_attention_dim
    drawn = max(MIN_DRAWN, SIZE) * 3 * parts.base.resolution_px**2 if parts.checker is not None else 0
    return int(latents + text) * _FLOAT_BYTES + drawn


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _used(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.exists() else 0


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
