"""Layers of transformers that a LoRA file calls as their authors do: they become diffusers' layers.

Authors fuse some, such as queries, keys and values, and the adapters on them.

Used by the reader. Shapes: i in, o out, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora_files.names import UNET_PREFIX, kohya_name

Part = dict[str, Tensor]
"""A module's tensors by kind: "down", "up", "alpha", "magnitude" or "scale"."""


def by_diffusers_layers(
    parts: Mapping[str, Part], layers: Mapping[str, tuple[str, ...]], *, dotted: bool, file: str
) -> dict[str, Part]:
    """The same update by diffusers' layers; modules that `layers` does not know stay as they are.

    Args:
        parts: By module path, or by kohya module name.
        layers: Patterns of authors' module paths to diffusers' module paths, as `re` expands them. Several share the
            rows of one layer equally.
        dotted: Whether `parts` are by module path.
        file: For messages.

    Raises:
        DataError: A layer is there under both names, or its rows are not divisible.
    """
    found: dict[str, Part] = {}
    for module, part in parts.items():
        names = _ours(module, layers, dotted=dotted)
        for name, own in zip(names, _divided(part, len(names), module, file), strict=True):
            if name in found:
                raise DataError(f"{file} contains {name!r} twice, under different names.")
            found[name] = own
    return found


def _ours(module: str, layers: Mapping[str, tuple[str, ...]], *, dotted: bool) -> list[str]:
    """What a module is by diffusers' layers; itself if it is none of the authors'."""
    for pattern, paths in layers.items():
        if match := re.fullmatch(pattern if dotted else UNET_PREFIX + pattern.replace(r"\.", "_"), module):
            ours = [match.expand(path) for path in paths]
            return ours if dotted else [kohya_name(path) for path in ours]
    return [module]


def _divided(part: Part, count: int, module: str, file: str) -> list[Part]:
    """A fused layer's tensors as those of `count` layers, each without the ranks that do nothing for it."""
    if count == 1 or "up" not in part:
        return [part] * count
    if part["up"].shape[0] % count:
        raise DataError(
            f"{file}: the module {module!r} is {count} layers in one, but its {part['up'].shape[0]} rows are not "
            f"divisible by {count}."
        )
    divided: list[Part] = []
    for place, up in enumerate(part["up"].chunk(count)):
        own = part | {"up": up}
        own |= {kind: part[kind].chunk(count)[place] for kind in ("magnitude", "scale") if kind in part}
        # Adapters of several layers are fused as blocks, each with its own ranks.
        used = up.flatten(1).ne(0).any(dim=0)
        if "down" in own and "alpha" in own and 0 < int(used.sum()) < len(used) == len(own["down"]):
            alpha = own["alpha"].double() * (float(used.sum()) / len(used))
            own |= {"down": own["down"][used], "up": up[:, used], "alpha": alpha}
        divided.append({kind: tensor.contiguous() for kind, tensor in own.items()})
    return divided
