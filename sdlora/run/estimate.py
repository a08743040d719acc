"""The estimate of a run from its configuration: memory, time, disk space, and what to set if memory is too small.

`sdlora plan` prints it; a run checks its memory and disks by the same figures before it starts.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from sdlora.common.bundled import BUILTIN_BASES, builtin_base
from sdlora.common.families import Family
from sdlora.common.text import format_bytes
from sdlora.config.presets import Preset
from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config
from sdlora.copycheck import features, scale
from sdlora.copycheck.power import SHARES, chance_to_notice
from sdlora.copycheck.signals import MAX_COMPARED, MAX_PROBED, NUM_PROBES, PROBED_TIMESTEPS
from sdlora.copycheck.verdict import FULL
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Dataset
from sdlora.errors import ConfigError
from sdlora.estimate.costs import (
    arithmetic_rate,
    bytes_in,
    cache_bytes,
    cached_content,
    check_disk_space,
    run_folder_bytes,
    step_seconds,
)
from sdlora.estimate.hints import CountedHint, hints_to_fit, with_values
from sdlora.estimate.memory import MemoryEstimate, MemoryInputs, estimate_memory
from sdlora.estimate.meta_model import Shapes, num_bytes, shapes_of_base, shapes_of_family, shapes_on_disk
from sdlora.events import saved_as, to_json
from sdlora.lora.quantize import TYPICAL_ERRORS, Quantization, num_weights, packing_errors
from sdlora.run.arguments import adapter_spec, training_settings
from sdlora.run.folder import RunFolder
from sdlora.run.lora_inputs import starting_file, with_settings_of_file
from sdlora.run.preview_requests import drawing_share, rounds_within_epochs
from sdlora.run.setup import RunContext, choose_device, prepare
from sdlora.training.data import TrainingData, evaluation_data, num_steps
from sdlora.training.schedules import Schedule
from sdlora.training.validation import NUM_MEASURED

_SHOWN_RATES = 40
_SMALL_BASE = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate(MemoryEstimate):
    """What a run needs, as `sdlora plan --json` prints it.

    Attributes:
        memory_bytes: The device's memory; None if unknown.
        changes: What to set until the run fits, each on top of those before it.
        exposures_per_image: How often each image is seen; the highest of several sets.
        images: How many are trained; None without images, as the next four.
        buckets: Width and height in pixels, and how many images have them.
        rates: The learning rate at up to 40 steps, evenly spread from the first to the last.
        seconds: Of all steps, from one that was timed; None also if it did not fit into memory.
        cache_bytes: What the run keeps in the cache on disk, at most.
        looking_share: The arithmetic of previews, validation and copy check over that of training; previews that are
            drawn only where copying is suspected do not count.
        chance_to_notice: How likely the copy check does not call an epoch clean in which a share of the images are
            copies, by share.
        packing_errors: How far packing moves the outputs of the base's layers, as a share of them, by each kind that is
            set or among the changes: measured on a few of its layers; without a base, of normally distributed weights
            and of heavy-tailed ones.
    """

    memory_bytes: int | None
    changes: list[CountedHint]
    exposures_per_image: int = field(metadata=saved_as("exposures_per_picture"))
    images: int | None = field(default=None, metadata=saved_as("pictures"))
    buckets: dict[str, int] = field(default_factory=dict)
    steps: int | None = None
    rates: list[float] = field(default_factory=list)
    seconds: float | None = None
    cache_bytes: int | None = None
    looking_share: float | None = None
    chance_to_notice: dict[str, float] = field(default_factory=dict)
    packing_errors: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def fits(self) -> bool | None:
        """Whether memory is enough; None if it is unknown."""
        return None if self.memory_bytes is None else self.peak_bytes <= self.memory_bytes

    @property
    def can_fit(self) -> bool:
        """Whether it fits with all changes."""
        return min([self.peak_bytes, *(change.peak_bytes for change in self.changes)]) <= (self.memory_bytes or 0)

    def to_json(self) -> dict[str, Any]:
        """All figures by their keys."""
        derived = {name: getattr(self, name) for name in ("peak_bytes", "fits", "full_training_bytes")}
        return {**to_json(self), **derived}


def estimate_shapes(
    config: RunConfig, shapes: Shapes | Family, memory_bytes: int | None, *, on_cpu: bool = False
) -> Estimate:
    """Estimate a run on a base model of given shapes, or a family's, without weights and images.

    `memory_bytes` is what the device has, if it is known.
    """
    config = with_settings_of_file(config)
    shapes = shapes_of_family(shapes) if isinstance(shapes, str) else shapes
    edge, precision = config.data.resolutions(shapes.resolution_px)[-1], config.train.precision
    # GPUs that train these models have bf16.
    dtype = torch.float32 if precision == "fp32" or (precision == "auto" and on_cpu) else torch.bfloat16
    inputs = MemoryInputs(
        config, adapter_spec(config), shapes, dtype, (edge, edge), on_cpu=on_cpu, file=starting_file(config)
    )
    return _estimate(inputs, memory_bytes, exposures_per_image=config.data.repeats_range[1] * config.train.epochs)


def count_preset(preset: Preset) -> dict[str, int]:
    """What a bundled configuration needs at its family's true shapes: the figures of `Preset`."""
    builtin = builtin_base(preset.family)
    config = load_config(preset.name, ["data.folder=none"] if builtin is None else [])
    shapes = cast(Family, preset.family) if builtin is None else shapes_on_disk(builtin)
    found = estimate_shapes(config, shapes, None)
    return {"peak_bytes": found.peak_bytes, "flops_per_exposure": found.flops_per_step // config.train.batch_size}


def changes_to_fit(config: RunConfig, memory_bytes: int) -> list[CountedHint]:
    """What to set so that a run fits into memory, each on top of those before it; nothing if it fits as it is.

    Only headers and configurations of the base model are read.

    Raises:
        ConfigError: Nothing makes it fit, or the base model is not on this machine and no family is given.
    """
    path, family = config.base.path, config.base.family
    place = builtin_base(path) or Path(path).expanduser()
    if place.exists():
        try:
            shapes: Shapes | Family = shapes_on_disk(place)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--memory: the shapes of {path!r} cannot be read ({error}); leave it out.") from error
    elif family not in ("any", *BUILTIN_BASES):
        shapes = cast(Family, family)
    else:
        raise ConfigError(
            f"--memory: {path!r} is not on this machine, so its memory is not known. Set base.family, or leave it out."
        )
    device, _, _ = choose_device(config.train.device, config.train.precision)
    found = estimate_shapes(config, shapes, memory_bytes, on_cpu=device.type == "cpu")
    if not found.fits and not found.can_fit:
        least = min([found.peak_bytes, *(change.peak_bytes for change in found.changes)])
        raise ConfigError(
            f"--memory: {format_bytes(memory_bytes)} is too little: with every change that saves memory, the run "
            f"needs {format_bytes(least)}. Use a smaller base model, or a device with more memory."
        )
    return found.changes


def count_steps(config: RunConfig, dataset: Dataset) -> int:
    """Optimizer steps of a run on images with their buckets."""
    return num_steps(training_settings(config), dataset)


def estimate_config(config: RunConfig, memory_bytes: int | None) -> Estimate:
    """Estimate a run from its configuration, images and base model; a step is timed, and nothing is written.

    Raises:
        SdloraError: Anything is wrong with the settings, the images or the base model.
    """
    config = with_settings_of_file(config)
    with tempfile.TemporaryDirectory() as scratch:
        # Gradients take as long for any optimizer, and this machine need not have the run's.
        simple = {"cache.dir": scratch, "copycheck.enabled": False, "train.compile": False, "train.optimizer": "adamw"}
        simple["train.optimizer_args"] = {}
        context = prepare(with_values(config, simple), RunFolder(Path(scratch) / "run", "plan"))
        inputs, examples = memory_inputs(context, config), context.data.dataset.examples
        memory = _free_bytes(context, inputs) if memory_bytes is None else memory_bytes
        cache, steps, seconds = cache_bytes_of_run(context, config), context.trainer.total_steps, None
        with suppress(torch.OutOfMemoryError):  # the estimate says what to set
            seconds = steps * step_seconds(context.trainer, config.data.background)
    schedule, shown = Schedule.of(context.trainer.settings), min(steps, _SHOWN_RATES)
    exposures = config.train.epochs * sum(example.repeats for example in examples)
    held = () if context.validation is None else context.validation.data.dataset.examples
    found = _estimate(
        inputs,
        memory,
        exposures_per_image=config.data.repeats_range[1] * config.train.epochs,
        images=len(examples),
        buckets={
            f"{width}x{height}": count
            for (width, height), count in Counter(bucket for e in examples for bucket in e.buckets).items()
        },
        steps=steps,
        rates=[schedule.rate(1 + round(i * (steps - 1) / (shown - 1)), steps) for i in range(shown)]
        if shown > 1
        else [],
        seconds=seconds,
        cache_bytes=cache,
    )
    previews = 0 if context.previews is None else len(context.previews.wanted())
    rounds = rounds_within_epochs(context.trainer.settings.preview_every_steps, steps, config.train.epochs)
    drawn = (config.train.epochs + 1 + rounds) * drawing_share(context.drawn)
    drawing = config.model_copy(update={"preview": context.config.preview})
    compared_px = None
    if context.previews is not None and features.feature_block(context.base.network) is not None:
        compared_px = min(context.previews.pixels(context.base.resolution_px))
    share = looking_share(found, drawing, len(examples), len(held), previews, exposures, drawn, compared_px)
    noticed = {}
    if _is_checked(config) and previews:
        noticed = {f"{share:.0%}": round(chance_to_notice(previews, share).not_clean, 3) for share in SHARES}
    errors = packing_errors(context.base.network, context.base.packed_blocks, _kinds(found.packing_errors))
    measured = found.packing_errors | {kind: (round(error, 4),) for kind, error in errors.items()}
    return replace(found, looking_share=round(share, 4), chance_to_notice=noticed, packing_errors=measured)


def _kinds(names: Iterable[str]) -> list[Quantization]:
    return [kind for kind in TYPICAL_ERRORS if kind in names]


def looking_share(
    found: MemoryEstimate,
    config: RunConfig,
    images: int,
    validation: int,
    previews: int,
    exposures: int,
    drawn: float | None = None,
    compared_px: int | None = None,
) -> float:
    """The arithmetic of looking at what is learned over that of learning it, in a whole run.

    Args:
        images: Training images.
        validation: Validation images.
        previews: Drawn after every epoch, and by the base model before the first.
        exposures: Of all training images together.
        drawn: How often the previews are drawn, others counted by their arithmetic; once for each of these if None.
        compared_px: The short edge of previews, if the copy check asks the network about them; else None.
    """
    ends = config.train.epochs + 1
    drawn = ends if drawn is None else drawn
    guided = 2 if config.preview.guidance > 1 else 1
    predictions = drawn * previews * guided * config.preview.num_steps + ends * validation * NUM_MEASURED
    decodings = drawn * previews
    if _is_checked(config):
        predictions += ends * min(images, MAX_PROBED) * len(PROBED_TIMESTEPS) * NUM_PROBES
        predictions += ends * min(images, MAX_COMPARED) * NUM_MEASURED
        decodings += min(images, scale.MAX_DECODED)
    if _is_checked(config) and compared_px is not None:
        # Encoding takes less than half of what decoding does.
        compared = (drawn * previews + images) * min(1.0, features.SHORT_PX / compared_px) ** 2
        predictions, decodings = predictions + compared, decodings + compared / 2
    looking = predictions * found.flops_per_prediction + decodings * found.flops_per_decoding
    return looking * config.train.batch_size / (exposures * found.flops_per_step)


def _estimate(inputs: MemoryInputs, memory_bytes: int | None, **counts: Any) -> Estimate:
    needed = estimate_memory(inputs)
    changes = [] if memory_bytes is None else hints_to_fit(inputs, needed, memory_bytes)
    changed = [change.values.get("base.quantization", "none") for change in changes]
    kinds = _kinds([inputs.config.base.quantization, *changed])
    errors: dict[str, tuple[float, ...]] = {kind: TYPICAL_ERRORS[kind] for kind in kinds}
    return Estimate(**vars(needed), memory_bytes=memory_bytes, changes=changes, packing_errors=errors, **counts)


def memory_of_run(context: RunContext) -> tuple[int | None, int | None]:
    """The peak of memory and what the device has for it; None for base models so small that they fit anywhere."""
    if num_weights(context.base.network) < _SMALL_BASE:
        return None, None
    inputs = memory_inputs(context, context.config)
    return estimate_memory(inputs).peak_bytes, _free_bytes(context, inputs)


def memory_inputs(context: RunContext, config: RunConfig) -> MemoryInputs:
    """What the memory estimate of a run depends on; `context` may differ from `config` in what a step is timed with."""
    on_cpu = context.loaded.device.type == "cpu"
    return MemoryInputs(
        config,
        adapter_spec(config),
        shapes_of_base(context.base),
        context.base.network.dtype,
        max((example.bucket for example in context.data.dataset.examples), key=prod),
        # Cached tensors stay in the host's memory, which is the device's own on a CPU.
        cached_bytes=cache_bytes_of_run(context, config) if on_cpu else 0,
        on_cpu=on_cpu,
        text_is_live=not (context.data.text_is_trained or context.data.cache.keeps_text),
        file=starting_file(config),
    )


def cache_bytes_of_run(context: RunContext, config: RunConfig) -> int:
    """What a run keeps in the cache, at most; for `config` see `memory_inputs`."""
    data, cache = context.data, context.data.cache
    used: list[tuple[TrainingData, Iterable[Exposure] | None]] = [
        (term.loss.data, term.schedule.timesteps) for term in context.trainer.terms
    ]
    if context.validation is not None:
        used.append((context.validation.data, None))
    if _is_checked(config):
        used.append((evaluation_data(data.dataset, cache, text_is_trained=data.text_is_trained), None))
    examples, captions = cached_content(used)
    return cache_bytes(cache, examples, len(captions) if cache.keeps_text and not data.text_is_trained else 0)


def _preview_pixels(context: RunContext) -> int:
    return max((prod(request.pixels(context.base.resolution_px)) for request in context.drawn), default=0)


def _is_checked(config: RunConfig) -> bool:
    return config.copycheck.enabled and config.preview.enabled


def check_disks(context: RunContext, *, resume: bool) -> None:
    """Check that a run's folder, and what it adds to the cache unless it is resumed, fit onto their disks.

    Raises:
        DiskFullError: They do not.
    """
    num_previews, trainer = context.num_previews, context.trainer
    if context.checker is not None:
        num_previews += max(0, FULL - len(context.drawn[0].wanted()))  # where copying is suspected
    rounds = rounds_within_epochs(
        trainer.settings.preview_every_steps, trainer.total_steps, context.config.train.epochs
    )
    written = run_folder_bytes(context.config, context.adapter, num_previews, _preview_pixels(context), rounds)
    needs = {"The run's folder": (context.folder.path, max(0, written - bytes_in(context.folder.path)))}
    if not resume:
        needs["the cache"] = (context.data.cache.folder, cache_bytes_of_run(context, context.config))
    check_disk_space(needs)


def device_rate() -> float:
    """The arithmetic of the device that training would take here, in the precision that it would take, in FLOP/s."""
    device, dtype, _ = choose_device("auto", "auto")
    return arithmetic_rate(device, dtype)


def device_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _free_bytes(context: RunContext, inputs: MemoryInputs) -> int:
    """Memory for a run: what is free, and what its networks hold already; text encoders may wait elsewhere."""
    device = context.loaded.device
    held = num_bytes(context.base.network, *context.base.text_encoders, on=device.type)
    return device_memory(device) + held + (inputs.shapes.vae_bytes if inputs.on_cpu else 0)
