"""Any finished LoRA file on a loaded base, as an adapter: to be drawn with, switched off and measured.

All of a file or none of it: a module that the base lacks is an error, never left out.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from sdlora.errors import DataError
from sdlora.lora.inject import Adapter, LoraState, LoraWeights, inject_state
from sdlora.lora.layers import LoraLayer
from sdlora.lora.targets import TEXT_ENCODER, by_prefix
from sdlora.lora.timestep_rank import TimestepRank, timestep_rank_in
from sdlora.lora_files.base_folder import layers_by_name
from sdlora.lora_files.names import first_text_encoder
from sdlora.lora_files.read import LoraFile, family_of


def attach(unet: nn.Module, file: LoraFile, *, text_encoders: Sequence[nn.Module] = ()) -> Adapter:
    """Put a LoRA of any trainer on a base, each module with its own rank and alpha.

    A file that sdlora trained with a timestep rank uses its ranks by noise level, and a frozen start is taken apart
    from what was trained, so that both answer as they did in training.

    Args:
        unet: Frozen and changed in place, unless an error is raised.
        file: The LoRA, as `sdlora.lora_files.read.read_file` gives it.
        text_encoders: Frozen, and changed in place where the file adapts them.

    Raises:
        DataError: A module is not in the base or of another shape there, or its alpha is unknown, or the file's
            metadata does not fit its ranks.
    """
    networks = by_prefix(unet, text_encoders)
    adapted = any(isinstance(module, LoraLayer) for network in networks.values() for module in network.modules())
    assert not adapted, "a base takes one adapter at a time; remove() the first"
    first = first_text_encoder(two=len(text_encoders) > 1)
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for prefix, network in networks.items():
        known |= layers_by_name(network, prefix, first)
    # A file of PEFT's names for the first text encoder alone does not tell that there are two.
    known |= {name.replace(first, "lora_te_"): layer for name, layer in known.items() if name.startswith(first)}
    missing = [name for name in file.state if name not in known]
    if missing:
        raise DataError(
            f"{file.name} adapts {missing[0]!r}, and this base has no such layer ({len(missing)} of the file's "
            f"{len(file.state)} modules are not in it). {_other_family(file)}"
        )
    start = "sdlora.frozen_start" in file.metadata
    state: LoraState = {}
    for name, weights in file.state.items():
        path, shape = known[name]
        state[path] = _fitted(file, name, _with_start(file, name, weights) if start else weights, shape)
    setting = timestep_rank_in(file.metadata, file.name)
    _check_ranks(file.name, state, setting)
    return inject_state(unet, state, text_encoders=text_encoders, timestep_rank=setting)


def _other_family(file: LoraFile) -> str:
    family = family_of(file.state)
    told = "" if family is None else f" (by its shapes: {family})"
    return f"The LoRA is for another family of bases{told}. Load the base that it was trained on."


def _fitted(file: LoraFile, name: str, weights: LoraWeights, shape: tuple[int, ...]) -> LoraWeights:
    """The weights as a layer of this shape takes them: a magnitude has the shape of its answers."""
    found = (weights.up.shape[0], *weights.down.shape[1:])
    if found != shape:
        raise DataError(
            f"{file.name} has an update of {found} for {name!r}, and this base's layer has {shape}. "
            f"{_other_family(file)}"
        )
    if math.isnan(weights.alpha):
        raise DataError(
            f"{file.name} does not tell the alpha of {name!r}, so that its strength is unknown. Ask whoever trained "
            "it, and read the file with that alpha as missing_alpha."
        )
    if weights.magnitude is None:
        return weights
    return replace(weights, magnitude=weights.magnitude.reshape((1, -1, 1, 1) if len(shape) == 4 else (-1,)))


def _with_start(file: LoraFile, name: str, weights: LoraWeights) -> LoraWeights:
    """The reverse of what `sdlora.lora_files.names.file_form` does with a frozen start."""
    rank, odd = divmod(weights.down.shape[0], 2)
    if odd:
        raise DataError(
            f"{file.name}: half of the ranks of {name!r} should be its frozen start, but it has {2 * rank + 1}. "
            "Was the file changed? Export it anew."
        )
    down, up = weights.down, weights.up
    initial = (down[rank:], -up[:, rank:])
    return replace(weights, down=down[:rank], up=up[:, :rank], alpha=weights.alpha / 2, initial=initial)


def _check_ranks(file: str, state: LoraState, setting: TimestepRank | None) -> None:
    if setting is None:
        return
    for path, weights in state.items():
        rank = weights.down.shape[0]
        if not path.startswith(TEXT_ENCODER) and rank < setting.rank_min:
            raise DataError(
                f"{file}: by its metadata at least {setting.rank_min} ranks are used, and {path!r} has {rank}. "
                "Was the file changed? Export it anew."
            )
