"""LoRAs in and out of a base's own weights, one tensor at a time: nothing is computed with the networks.

Only the UNet and the text encoders are looked at, for no LoRA changes anything else. Where their weights lie
`folders.py` tells of a folder, and `models/layout.py` of a checkpoint in one file.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdlora.common.files import atomic_folder, atomic_path
from sdlora.errors import BaseModelError, DataError, ExportError, OutputError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.algebra import update
from sdlora.models.safetensors_header import read_header

_SUMMED = ("F32", "F16", "BF16")
# ModelSpec's hash of all numbers in a file.
_HASH = re.compile(rb'"modelspec\.hash_sha256"\s*:\s*"0x([0-9a-fA-F]{64})"')


@dataclass(frozen=True)
class Place:
    """Where a weight of a network lies on the disk.

    Attributes:
        file: The safetensors file.
        key: The tensor in it.
        shape: The weight's own, as diffusers has it.
        rows: The tensor's first row that is the weight's and the first after it; None for all of them.
        transposed: Whether the weight lies there transposed.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The weight as a view of the tensor."""
        own = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        return own.T if self.transposed else own


@dataclass(frozen=True)
class BaseWeights:
    """Where all weights of a base's UNet and text encoders lie.

    Attributes:
        path: The folder or the file.
        places: By NETWORK.PATH.weight or .bias; several if a folder holds several variants.
        layers: The layers that a LoRA can be on: kohya module name to name in `places`.
    """

    path: Path
    places: Mapping[str, Sequence[Place]]
    layers: Mapping[str, str]


def merge_into(base: BaseWeights, output: Path, state: LoraState) -> int:
    """Write a copy of a base in which a LoRA is part of the weights.

    Everything else of it stays as it is, byte for byte: other tensors, their order and types, metadata but for a hash
    of the numbers, other files.

    Args:
        base: Of a folder or a file.
        output: What to write; it must not be there yet.
        state: A LoRA by kohya module name, without magnitudes. W + Delta is summed in float32 and rounded to W's type.

    Returns:
        How many layers were changed.

    Raises:
        BaseModelError: The base cannot be read, or stores a layer in a type that is not summed.
        DataError: A module is not in the base, or of another shape there.
        ExportError: A sum is too large for the base's type.
        OutputError: `output` is there already, or inside the base.
    """
    if base.path.is_dir() and output.resolve().is_relative_to(base.path.resolve()):
        raise OutputError(f"{output} is inside the base. Give an --output beside it.")
    terms = _terms(base, state)
    with _copy(base.path, output) as copy:
        for file, by_key in terms.items():
            _add(file, copy / file.relative_to(base.path), by_key)
    return len(state)


# What is added to a file's tensors: by key, with the place in the tensor.
_Terms = dict[str, list[tuple[Place, LoraWeights]]]


def _terms(base: BaseWeights, state: LoraState) -> dict[Path, _Terms]:
    """What is added where. Headers alone are read, so that what does not fit is refused before anything is written."""
    missing = [name for name in state if name not in base.layers]
    if missing:
        raise DataError(f"{len(missing)} modules are not in {base.path.name}, among them {min(missing)!r}.")
    found: dict[Path, _Terms] = {}
    for name, weights in state.items():
        for place in base.places[base.layers[name]]:
            own = (weights.up.shape[0], *weights.down.shape[1:])
            if own != place.shape:
                raise DataError(
                    f"{name!r} makes an update of {own}, and the layer of {base.path.name} has {place.shape}."
                )
            found.setdefault(place.file, {}).setdefault(place.key, []).append((place, weights))
    for file, terms in found.items():
        dtypes = read_header(file).dtypes
        if odd := [key for key in terms if dtypes[key] not in _SUMMED]:
            raise BaseModelError(
                f"{file.name} stores {odd[0]!r} as {dtypes[odd[0]]}, which is too coarse to hold a LoRA's update. Take "
                "the base in float16, bfloat16 or float32."
            )
    return found


@contextmanager
def _copy(base: Path, output: Path) -> Iterator[Path]:
    """Yield a copy of a folder or a file; it becomes `output` when the block ends without an error."""
    if base.is_file():
        if output.exists():
            raise OutputError(f"{output} exists already. Give another name, or move it away.")
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
    with _opened(source) as opened, copy.open("r+b") as handle:
        for key, parts in terms.items():
            weight = opened.get_tensor(key)
            total = weight.to(torch.float32, copy=True)
            for place, weights in parts:
                view = place.of(total)
                view += update(weights).float().reshape(view.shape)
            rounded = total.to(weight.dtype)
            if not bool(torch.isfinite(rounded).all()):
                dtype = str(weight.dtype).removeprefix("torch.")
                raise ExportError(f"The sum for {key!r} is too large for {dtype}. Give a lower --weights.")
            handle.seek(starts[key])
            handle.write(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
    _renew_hash(copy)


def _renew_hash(file: Path) -> None:
    """Make ModelSpec's hash of a file's numbers true again, if it has one."""
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
        Kohya module names and differences, one at a time, of the layers that a LoRA can be on and that differ; and the
        names of all other weights of the UNet and the text encoders that differ, which no LoRA holds.

    Raises:
        BaseModelError: One of them cannot be read.
        DataError: The two have different weights by name or shape.
    """
    ours, theirs = _single(fine_tuned), _single(base)
    tuned_name, base_name = fine_tuned.path.name, base.path.name
    if odd := sorted(set(ours) ^ set(theirs)):
        raise DataError(f"{tuned_name} and {base_name} are not of one kind: only one has {odd[0]!r}.")
    for name, place in ours.items():
        if place.shape != theirs[name].shape:
            raise DataError(
                f"{name!r} has the shapes {place.shape} and {theirs[name].shape} in {tuned_name} and {base_name}."
            )
    with _reading() as read:
        changed = [name for name in ours if not _same(read(ours[name]), read(theirs[name]))]
    layers = {name: layer for layer, name in base.layers.items()}
    found = {layers[name]: (ours[name], theirs[name]) for name in changed if name in layers}
    return _each(found), [name for name in changed if name not in layers]


def _each(pairs: Mapping[str, tuple[Place, Place]]) -> Iterator[tuple[str, Tensor]]:
    with _reading() as read:
        for layer, (one, other) in pairs.items():
            yield layer, read(one).float() - read(other).float()


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.float(), other.float())


def _single(base: BaseWeights) -> dict[str, Place]:
    """The one place of every weight."""
    if twice := [name for name, places in base.places.items() if len(places) > 1]:
        raise BaseModelError(f"{base.path} holds {twice[0]!r} twice: keep one variant of its weights.")
    return {name: place for name, (place,) in base.places.items()}


@contextmanager
def _reading() -> Iterator[Callable[[Place], Tensor]]:
    """Yield what reads weights, with every file opened once."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(place: Place) -> Tensor:
            if place.file not in files:
                files[place.file] = stack.enter_context(_opened(place.file))
            return place.of(files[place.file].get_tensor(place.key))

        yield read


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise BaseModelError(f"{file} is not a readable safetensors file: {error}.") from error
    with opened as handle:
        yield handle
