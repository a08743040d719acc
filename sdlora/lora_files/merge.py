"""Merge LoRAs into a base model's weights, and find what differs between two: one tensor at a time.

Called by `sdlora merge --into`, `sdlora extract` and runs with base.merge; `base_weights` says where weights lie.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sdlora.common.files import atomic_folder, atomic_path
from sdlora.errors import BaseModelError, DataError, ExportError, OutputError
from sdlora.lora.inject import LoraState, LoraWeights, network_of
from sdlora.lora.timestep_rank import timestep_rank_in
from sdlora.lora_files.algebra import update
from sdlora.lora_files.base_weights import BaseWeights, Place, check_fit
from sdlora.lora_files.pipelines import state_by_path
from sdlora.lora_files.read import LoraFile
from sdlora.models.architectures import read_header

# What to add to a file's tensors: by key, with the place in the tensor.
_Terms = dict[str, list[tuple[Place, LoraWeights]]]
# ModelSpec's hash of all tensors in a file.
_HASH = re.compile(rb'"modelspec\.hash_sha256"\s*:\s*"0x([0-9a-fA-F]{64})"')


def merge_into(base: BaseWeights, output: Path, state: LoraState) -> int:
    """Write a copy of a base with a LoRA merged into the weights.

    Everything else stays as it is, byte for byte: other tensors, their order and dtypes, metadata except a hash of the
    tensors, other files.

    Args:
        output: The folder or file to write; it must not exist.
        state: A LoRA by kohya module name, without magnitudes. W + Delta is summed in float32 and rounded to W's dtype.

    Returns:
        Number of layers changed.

    Raises:
        BaseModelError: The base cannot be read, or stores a layer in too coarse a dtype.
        DataError: A module is not in the base, or has another shape there.
        ExportError: A sum is outside the range of the base's dtype.
        OutputError: `output` exists, or is inside the base.
    """
    if base.path.is_dir() and output.resolve().is_relative_to(base.path.resolve()):
        raise OutputError(f"{output} is inside the base model's folder {base.path}. Give an --output outside it.")
    terms = _terms(base, state)
    with _copy(base.path, output) as copy:
        for file, by_key in terms.items():
            _add(file, copy / file.relative_to(base.path), by_key)
    return len(state)


def _terms(base: BaseWeights, state: LoraState) -> dict[Path, _Terms]:
    """What to add where; reads headers alone, so that a misfit is refused before anything is written."""
    places = {layer: base.places[name] for layer, name in base.layers.items()}
    check_fit(state, [(layer, place.shape) for layer, own in places.items() for place in own], base=base.path.name)
    found: dict[Path, _Terms] = {}
    for name, weights in state.items():
        for place in places[name]:
            found.setdefault(place.file, {}).setdefault(place.key, []).append((place, weights))
    for file, terms in found.items():
        dtypes = read_header(file).dtypes
        if coarse := [key for key in terms if dtypes[key] not in ("F32", "F16", "BF16")]:
            raise BaseModelError(
                f"{file.name} stores {coarse[0]!r} as {dtypes[coarse[0]]}, which is too coarse for a LoRA's update. "
                "Use the base model in float16, bfloat16 or float32."
            )
    return found


def merge_loras(
    files: Sequence[tuple[LoraFile, float]], networks: Mapping[str, nn.Module], wanted: Collection[str]
) -> None:
    """Merge LoRAs with their weights into a loaded base's networks, one after the other, as diffusers' `fuse_lora`.

    W becomes W + w Delta, and under a DoRA m (W + w Delta) / ||W + w Delta||, computed in float32.

    Args:
        networks: All of the base, by their names in `sdlora.lora.inject.NETWORKS`, without adapters, not quantized.
        wanted: The names of those to change, which are float32.

    Raises:
        DataError: A module is not in the base or has another shape there, or a LoRA's ranks depend on the timestep.

    Source: Hu et al. 2106.09685, equation 3; Liu et al. 2402.09353, equation 5.
    """
    for file, weight in files:
        if timestep_rank_in(file.metadata, file.name) is not None:
            raise DataError(
                f"{file.name} uses fewer ranks at high noise (lora.timestep_rank_min), which weights that are the same "
                "at every timestep cannot hold. Merge a LoRA without a timestep rank."
            )
        for path, weights in state_by_path(networks, file).items():
            if (network := network_of(path)) not in wanted:
                continue
            module: Any = networks[network].get_submodule(path.removeprefix(f"{network}."))
            module.weight = nn.Parameter(_merged(module.weight.detach(), weights, weight), requires_grad=False)


def _merged(base: Tensor, weights: LoraWeights, weight: float) -> Tensor:
    """W with a LoRA's or DoRA's update, (o, i) or (o, i, k, k)."""
    total = base.float() + (weight * update(weights)).float().view_as(base)
    if weights.magnitude is not None:
        rows = total.flatten(1)
        total = (rows * (weights.magnitude.flatten() / rows.norm(dim=1)).unsqueeze(1)).view_as(base)
    return total


@contextmanager
def _copy(base: Path, output: Path) -> Iterator[Path]:
    """Yield a copy of a folder or a file; it becomes `output` when the block ends without an error."""
    if base.is_file():
        if output.exists():
            raise OutputError(f"{output} already exists. Give another --output, or move it away.")
        with atomic_path(output) as temporary:
            shutil.copyfile(base, temporary)
            yield temporary
        return
    with atomic_folder(output) as temporary:
        for file in sorted(base.rglob("*")):
            if file.is_file():
                target = temporary / file.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        yield temporary


def _add(source: Path, copy: Path, terms: _Terms) -> None:
    """Add updates to tensors of a copied file, each in its place."""
    starts = read_header(source).starts
    with _reading() as read, copy.open("r+b") as handle:
        for key, parts in terms.items():
            weight = read(source, key)
            total = weight.to(torch.float32, copy=True)
            for place, weights in parts:
                place.add(total, update(weights))
            rounded = total.to(weight.dtype)
            if not bool(torch.isfinite(rounded).all()):
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ExportError(f"The merged weight {key!r} is outside the range of {dtype}. Give lower --weights.")
            handle.seek(starts[key])
            handle.write(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
    _renew_hash(copy)


def _renew_hash(file: Path) -> None:
    """Update ModelSpec's hash of a file's tensors, if it has one."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        match = _HASH.search(handle.read(length))
        if match is not None:
            # The handle is behind the header now: the hash is of what follows.
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            handle.seek(8 + match.start(1))
            handle.write(digest.encode("ascii"))


def differences(fine_tuned: BaseWeights, base: BaseWeights) -> tuple[Iterator[tuple[str, Tensor]], list[str]]:
    """Fine-tuned minus base, in float32.

    Returns:
        Kohya module names and differences, one at a time, of the layers that differ and that a LoRA can be on; and the
        names of all other weights of the UNet and the text encoders that differ.

    Raises:
        BaseModelError: One of them cannot be read.
        DataError: The names or shapes of their weights differ.
    """
    ours, theirs = _single(fine_tuned), _single(base)
    differ = f"{fine_tuned.path.name} and {base.path.name} have different architectures"
    if only_one := sorted(set(ours) ^ set(theirs)):
        raise DataError(
            f"{differ}: only one of them has {only_one[0]!r}. Give the base model that the other was fine-tuned from."
        )
    for name, place in ours.items():
        if place.shape != theirs[name].shape:
            raise DataError(
                f"{differ}: {name!r} has the shape {place.shape} in one and {theirs[name].shape} in the other."
            )
    with _reading() as read:
        changed = [
            name for name in ours if not torch.equal(*(place.load(read) for place in (ours[name], theirs[name])))
        ]
    layers = {name: layer for layer, name in base.layers.items()}

    def subtracted() -> Iterator[tuple[str, Tensor]]:
        with _reading() as read:
            for name in changed:
                if name in layers:
                    yield layers[name], ours[name].load(read) - theirs[name].load(read)

    return subtracted(), [name for name in changed if name not in layers]


def _single(base: BaseWeights) -> dict[str, Place]:
    """The only place of every weight."""
    if twice := [name for name, places in base.places.items() if len(places) > 1]:
        raise BaseModelError(f"{base.path} contains {twice[0]!r} twice. Keep only one variant of its weights.")
    return {name: place for name, (place,) in base.places.items()}


@contextmanager
def _reading() -> Iterator[Callable[[Path, str], Tensor]]:
    """Yield a function that reads a tensor of a file and opens every file once."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(file: Path, key: str) -> Tensor:
            try:
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise BaseModelError(
                    f"cannot read {file} as safetensors: {error}. Download or copy it again."
                ) from error
            tensor: Tensor = files[file].get_tensor(key)
            return tensor

        yield read
