"""What to set so that a run needs less memory: one list of hints, the cheapest first.

Used by `sdlora plan` and the studio, which count what each saves, and by the message of an out-of-memory error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

import torch

from sdlora.common.text import format_bytes
from sdlora.config.schema import RunConfig
from sdlora.config.toml import FREE_WHEN_RESUMING
from sdlora.estimate.memory import MemoryEstimate, MemoryInputs, estimate_memory

Stage = Literal["load", "cache", "train", "export", "preview"]
"""What a run is doing when memory runs out."""

_FAILURES: dict[Stage, str] = {
    "load": "The base model does not fit into the device's memory.",
    "cache": "The device ran out of memory while encoding images.",
    "train": "The device ran out of memory in a training step.",
    "export": "The device ran out of memory while verifying an epoch's file.",
    "preview": "The device ran out of memory while drawing previews.",
}
_OFFLOADED = "the same training, slower: the base's blocks come from the computer's own memory when they are used"
_MOST_TOLD = 2  # hints for a new run in one message
# Options that an estimate does not depend on.
_UNCOUNTED = {"train.auto_batch", "preview.guidance", "train.device"}


@dataclass(frozen=True)
class Hint:
    """One way to need less memory.

    Attributes:
        values: Options by their dotted names, and what to set them to.
        price: What it costs, in a few words.
        stages: Where it saves memory.
        size_px: Width and height that the largest images then have; None if they stay as they are.
    """

    values: dict[str, Any]
    price: str
    stages: tuple[Stage, ...] = ("train",)
    size_px: tuple[int, int] | None = None

    def text(self, equals: str = " = ") -> str:
        """The options and values as TOML, or as `--set` reads them."""
        return " and ".join(f"{name}{equals}{_toml(value)}" for name, value in self.values.items())

    @property
    def can_resume(self) -> bool:
        """Whether a run may be resumed with it."""
        return self.values.keys() <= FREE_WHEN_RESUMING


@dataclass(frozen=True)
class CountedHint:
    """A hint on top of those before it, and what the run then needs.

    Attributes:
        change: The options and values as TOML.
        peak_bytes: The peak of memory with it.
        time: Arithmetic per image over that without any hint.
    """

    change: str
    peak_bytes: int
    time: float
    price: str
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.change} ({self.price})"

    def overrides(self) -> list[str]:
        """The options and values as `--set` takes them."""
        return [f"{name}={_toml(value)}" for name, value in self.values.items()]


def hints(config: RunConfig, dtype: torch.dtype, size_px: tuple[int, int]) -> list[Hint]:
    """Everything that can be lowered, the cheapest first.

    Args:
        dtype: The frozen UNet's type.
        size_px: Width and height of the largest images.
    """
    train, lora, quantization = config.train, config.lora, config.base.quantization
    found: list[Hint] = []
    weights: tuple[Stage, ...] = ("load", "train", "export")
    if dtype == torch.float32:
        found.append(Hint({"train.precision": "bf16"}, "as good; faster where the device has it", weights))
    if train.batch_size > 1:
        if not train.auto_batch:
            found.append(Hint({"train.auto_batch": True}, "the same training; batches in parts where they do not fit"))
        steps = train.gradient_accumulation_steps * train.batch_size
        smaller = {"train.batch_size": 1, "train.gradient_accumulation_steps": steps}
        found.append(Hint(smaller, "the same training in more passes, which keeps a fast GPU less busy"))
    # The schema takes neither of them with what follows.
    not_compiled: dict[str, Any] = {"train.compile": False} if train.compile else {}
    if quantization == "none":
        int8 = not_compiled | {"base.quantization": "int8"}
        found.append(Hint(int8, "the base's weights rounded by about a hundredth", weights))
    if not train.gradient_checkpointing:
        found.append(Hint({"train.gradient_checkpointing": True}, "the same training, computed partly twice"))
    if config.preview.enabled:
        price = "the same training, unseen: no previews and no copy check"
        found.append(Hint({"preview.enabled": False}, price, ("preview",)))
        if config.preview.guidance > 1:
            found.append(Hint({"preview.guidance": 1.0}, "previews without guidance, which look worse", ("preview",)))
    if quantization != "nf4":
        found.append(Hint({"base.quantization": "nf4"}, "the base's weights rounded by about a tenth", weights))
    if not any(one.resolutions_px for one in config.data.raw_sets):
        found += _smaller_images(config, size_px)
    rank, lowest = lora.rank // 2, (lora.timestep_rank_min or 0) + 1
    if lora.from_file is None and lora.rank == max(lora.ranks()) and rank >= lowest:
        found.append(Hint({"lora.rank": rank}, "an adapter that holds half as much"))
    if train.device != "cpu" and config.base.offload == "none":
        found.append(Hint({**not_compiled, "base.offload": "blocks"}, _OFFLOADED, ("load", "train")))
    if train.device != "cpu":
        found.append(Hint({"train.device": "cpu"}, "much slower", ("load", "export")))
    return found


def _smaller_images(config: RunConfig, size_px: tuple[int, int]) -> Iterator[Hint]:
    step_px, (*smaller, largest) = config.data.bucket_step_px, config.data.resolutions(1)
    for share in (smaller[-1] / largest,) if smaller else (3 / 4, 1 / 2):
        width, height = (max(step_px, round(edge * share / step_px) * step_px) for edge in size_px)
        if width * height < size_px[0] * size_px[1]:
            values: dict[str, Any] = {"data.resolution_px": smaller[-1] if smaller else min(width, height)}
            if smaller:
                values = (values if config.data.resolution_px else {}) | {"data.resolutions_px": smaller}
            yield Hint(values, "images are trained smaller", ("cache", "train"), (width, height))


def hints_to_fit(inputs: MemoryInputs, needed: MemoryEstimate, memory_bytes: int) -> list[CountedHint]:
    """What to set until a run that needs `needed` fits, the cheapest first; each comes on top of those before it.

    Returns:
        Nothing if it fits as it is; otherwise as few as are enough, or all that save memory.
    """
    found: list[CountedHint] = []
    peak, first = needed.peak_bytes, needed.flops_per_step / inputs.config.train.batch_size
    for hint in hints(inputs.config, inputs.dtype, inputs.size_px):
        if peak <= memory_bytes:
            break
        if hint.values.keys() & _UNCOUNTED:
            continue
        dtype = torch.bfloat16 if "train.precision" in hint.values else inputs.dtype
        config, size_px = with_values(inputs.config, hint.values), hint.size_px or inputs.size_px
        changed = replace(inputs, config=config, dtype=dtype, size_px=size_px)
        less = estimate_memory(changed)
        if less.peak_bytes < peak:
            inputs, peak = changed, less.peak_bytes
            time = less.flops_per_step / config.train.batch_size / first
            price = hint.price
            if "base.offload" in hint.values:
                price += f", {format_bytes(less.transferred_bytes)} in each step"
            found.append(CountedHint(hint.text(), peak, time, price, hint.values))
    return found


def out_of_memory_message(config: RunConfig, stage: Stage, resolution_px: int) -> str:
    """What happened and what to set, after the device ran out of memory in a run of this training size."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    helpful = [hint for hint in hints(config, dtype, (resolution_px, resolution_px)) if stage in hint.stages]
    to_resume = [hint for hint in helpful if hint.can_resume and stage != "load"]
    # Of hints for the same option, the first.
    for_new_run: dict[str, Hint] = {}
    for hint in helpful:
        if hint not in to_resume:
            for_new_run.setdefault(list(hint.values)[-1], hint)
    told = [_FAILURES[stage]]
    if to_resume:
        told.append(f"To resume: --resume --set {_described(to_resume[0], config, resolution_px, equals='=')}.")
    if for_new_run:
        each = [_described(hint, config, resolution_px) for hint in list(for_new_run.values())[:_MOST_TOLD]]
        told.append(f"For a new run, set {', or '.join(each)}.")
    if stage == "load":
        told.append("Or close other programs that use the device.")
    return " ".join(told)


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """A configuration with some options changed, by their dotted names; they are not checked again."""
    for name, value in values.items():
        section, option = name.split(".")
        changed = getattr(config, section).model_copy(update={option: value})
        config = config.model_copy(update={section: changed})
    return config


def _described(hint: Hint, config: RunConfig, resolution_px: int, equals: str = " = ") -> str:
    """A hint with the values that its options have now, and its price."""
    values = [attrgetter(name)(config) for name in hint.values]
    now = " and ".join(_toml(resolution_px if value is None else value) for value in values)
    return f"{hint.text(equals)} (now {now}; {hint.price})"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
