"""What programs other than diffusers make of a LoRA file, as far as it is not what was trained, and files for PEFT.

Used at export, where the base model's weights are at hand. Formulas follow the programs' own code.
Shapes: o out, i in, k kernel.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.common.files import atomic_path, write_json
from sdlora.errors import DataError, ExportError
from sdlora.lora.inject import NETWORKS, LoraState, network_of
from sdlora.lora_files.algebra import update
from sdlora.lora_files.names import PEFT_METADATA, kohya_name, portable_state, rounded
from sdlora.lora_files.read import read_file, read_tensors


def check_same_weights(file: Path, state: LoraState, dtype: torch.dtype, *, two_text_encoders: bool) -> None:
    """Prove a file by its weights: read back, they are those that it was written from, bit for bit.

    Args:
        state: The trained weights, by module path.
        dtype: Dtype that the file stores.

    Raises:
        ExportError: A weight differs, or is missing.
    """
    found = read_file(file).state
    written = rounded(portable_state(state), dtype)
    names = {kohya_name(path, two_text_encoders=two_text_encoders): path for path in written}
    if found.keys() != names.keys():
        raise ExportError(f"{file}: other modules were written than were trained.")
    for name, path in names.items():
        ours, theirs = written[path], found[name]
        pairs = [(ours.down, theirs.down), (ours.up, theirs.up)]
        if ours.magnitude is not None and theirs.magnitude is not None:
            pairs.append((ours.magnitude.flatten(), theirs.magnitude.flatten()))
        same_kind = (ours.magnitude is None) == (theirs.magnitude is None)
        if not same_kind or ours.alpha != theirs.alpha or not all(torch.equal(one, other) for one, other in pairs):
            raise ExportError(f"{file}: the weights of {path!r} are not those that were trained.")


@torch.no_grad()
def dora_elsewhere(networks: Mapping[str, nn.Module], state: LoraState) -> dict[str, float]:
    """How far programs' weights are from a DoRA's, as a share of what it changes (root mean squares), by program.

    ComfyUI and Forge divide by the rows' norms of the base model's weights instead of the changed ones', A1111 by the
    norms of inputs whatever the axis of the magnitudes.

    Args:
        networks: The base model's, by their names in `NETWORKS`, without adapters.
        state: A DoRA by module path.

    Source: ComfyUI comfy/weight_adapter/base.py, `weight_decompose`; A1111 extensions-builtin/Lora/network.py,
    `apply_weight_decompose`; Liu et al. 2402.09353, equation 5.
    """
    changed, wrong = 0.0, {"ComfyUI": 0.0, "A1111": 0.0}
    for path, weights in state.items():
        assert weights.magnitude is not None, "a module of a DoRA has magnitudes"
        network = network_of(path)
        layer = networks[network].get_submodule(path.removeprefix(f"{network}."))
        base = layer.get_parameter("weight").detach().float().cpu()
        total = base + update(weights).float().view_as(base)
        magnitude = weights.magnitude.reshape(-1, *(1 for _ in base.shape[1:]))
        trained = total * magnitude / _row_norms(total)
        changed += float((trained - base).square().sum())
        columns = _row_norms(total.transpose(0, 1)).transpose(0, 1)
        for program, norms in (("ComfyUI", _row_norms(base)), ("A1111", columns)):
            wrong[program] += float((total * magnitude / norms - trained).square().sum())
    return {program: (error / changed) ** 0.5 if changed > 0 else 0.0 for program, error in wrong.items()}


def _row_norms(weight: Tensor) -> Tensor:
    """(o, i) or (o, i, k, k) to (o, 1) or (o, 1, 1, 1)."""
    norms: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return norms.reshape(-1, *(1 for _ in weight.shape[1:]))


def comfyui_modules(paths: Collection[str]) -> int:
    """How many modules under PEFT's names ComfyUI applies: those outside the UNet's attention, and CLIP's under an
    older transformers' names.

    Source: ComfyUI comfy/lora.py, `model_lora_keys_unet` and `model_lora_keys_clip`, whose names for attention are
    diffusers' older ones, with ".processor".
    """
    own = [path for path in paths if network_of(path) == "unet" and ".to_" not in path]
    return len(own) + sum(path.startswith("text_encoder.text_model.") for path in paths)


def write_peft_folders(file: Path, folder: Path) -> list[Path]:
    """Write what `PeftModel.from_pretrained` loads, a folder per network, from a file under PEFT's names.

    Returns:
        The folders: "unet" and those of text encoders, each with `adapter_config.json` and
        `adapter_model.safetensors`.

    Raises:
        DataError: The file has other names, or no settings.
    """
    tensors, metadata = read_tensors(file)
    if PEFT_METADATA not in metadata:
        raise DataError(f"{file.name} has no {PEFT_METADATA}, which a file under PEFT's names needs.")
    settings = json.loads(metadata[PEFT_METADATA])
    written = []
    for network in NETWORKS:
        own = {key.removeprefix(f"{network}."): t for key, t in tensors.items() if network_of(key) == network}
        if not own:
            continue
        place = folder / network
        # PEFT's own files have a magnitude without the name of its parameter.
        named = {f"base_model.model.{key.replace('vector.weight', 'vector')}": t for key, t in own.items()}
        with atomic_path(place / "adapter_model.safetensors") as temporary:
            save_file(named, temporary, metadata={"format": "pt"})
        mine = {k.removeprefix(f"{network}."): v for k, v in settings.items() if k.startswith(f"{network}.")}
        kind = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
        write_json(place / "adapter_config.json", kind | mine)
        written.append(place)
    return written
