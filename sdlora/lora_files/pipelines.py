"""Finished LoRA files on loaded base models, as adapters.

For `sdlora check`, the studio and runs that continue a file; `timestep_ranks` is for diffusers pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from sdlora.errors import DataError
from sdlora.lora.inject import NETWORKS, TEXT_ENCODER, Adapter, LoraState, LoraWeights, inject_state
from sdlora.lora.layers import LoraLayer
from sdlora.lora.timestep_rank import timestep_rank_in
from sdlora.lora_files.base_weights import check_fit, layers_by_name
from sdlora.lora_files.read import LoraFile, family_of, without_alpha


def attach(unet: nn.Module, file: LoraFile, *, text_encoders: Sequence[nn.Module] = ()) -> Adapter:
    """Put a LoRA of any trainer on a base, each module with its own rank and alpha.

    Timestep-dependent ranks of sdlora's files are used, and frozen initial factors are separated from the trained
    ones, so that predictions are the same as in training.

    Args:
        unet: Frozen and changed in place, unless an error is raised.
        text_encoders: Frozen, and changed in place where the file adapts them.

    Raises:
        DataError: A module is not in the base or has another shape there, its alpha is unknown, or the file's
            metadata does not fit its ranks.
    """
    networks = dict(zip(NETWORKS, (unet, *text_encoders), strict=False))
    adapted = any(isinstance(module, LoraLayer) for network in networks.values() for module in network.modules())
    assert not adapted, "a base takes one adapter at a time; remove() the first"
    state = state_by_path(networks, file)
    for path, weights in state.items():
        if "sdlora.frozen_start" in file.metadata:
            weights = with_initial(file.name, path, weights)
        if weights.magnitude is not None:
            magnitude = weights.magnitude.reshape((1, -1, 1, 1) if weights.down.dim() == 4 else (-1,))
            weights = replace(weights, magnitude=magnitude)
        state[path] = weights
    setting = timestep_rank_in(file.metadata, file.name)
    for path, weights in state.items():
        rank = weights.down.shape[0]
        if setting is not None and not path.startswith(TEXT_ENCODER) and rank < setting.rank_min:
            raise DataError(
                f"{file.name}: by its metadata every module has at least {setting.rank_min} ranks, but {path!r} has "
                f"{rank}. The file was changed after training; export it again."
            )
    return inject_state(unet, state, text_encoders=text_encoders, timestep_rank=setting)


def state_by_path(networks: Mapping[str, nn.Module], file: LoraFile) -> LoraState:
    """A file's weights by module path, in the networks' order; `networks` are by their names in `NETWORKS`.

    Raises:
        DataError: A module is not in the base or has another shape there, or its alpha is unknown.
    """
    known = layers_by_name(networks)
    # A file with PEFT's names for the first text encoder alone does not tell that there are two.
    known |= {name.replace("lora_te1_", "lora_te_"): layer for name, layer in known.items()}
    family = family_of(file.state, file.metadata)
    trained_on = "another base model" if family is None else f"a base model of the family {family}"
    hint = f"It was trained on {trained_on}: load that one."
    shapes = [(name, shape) for name, (_, shape) in known.items()]
    check_fit(file.state, shapes, base="this base model", file=file.name, hint=hint)
    if unknown := without_alpha(file):
        raise DataError(
            f"{file.name}: {unknown[0]!r} has no alpha, so the LoRA's strength is unknown. Ask whoever trained it, "
            "and read the file with that alpha as missing_alpha."
        )
    return {path: file.state[name] for name, (path, _) in known.items() if name in file.state}


def with_initial(file: str, name: str, weights: LoraWeights) -> LoraWeights:
    """The reverse of what `sdlora.lora_files.names.portable_state` does with frozen initial factors."""
    rank, odd = divmod(weights.down.shape[0], 2)
    if odd:
        raise DataError(
            f"{file}: by its metadata half of the ranks of {name!r} are frozen, but it has {2 * rank + 1}. The file "
            "was changed after training; export it again."
        )
    down, up = weights.down, weights.up
    initial = (down[rank:], -up[:, rank:])
    return replace(weights, down=down[:rank], up=up[:, :rank], alpha=weights.alpha / 2, initial=initial)
