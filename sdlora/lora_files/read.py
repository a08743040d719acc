"""LoRA files of any trainer: read into one form, and written from it under kohya's or PEFT's names.

Three spellings are read: kohya's, PEFT's and diffusers' older ones. Modules go by kohya's names in all of
them, since kohya's underscores cannot be turned back into dots without the network, and the reverse always can. Layers
named by the UNet's original blocks, as sd-scripts does for SDXL, are renamed by diffusers' blocks on reading.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdlora.common.files import atomic_path
from sdlora.errors import DataError, ExportError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora.targets import NETWORKS, network_of
from sdlora.lora_files.names import PEFT_METADATA, first_text_encoder, kohya_name, kohya_tensors, to_peft
from sdlora.lora_files.names_sgm import diffusers_name
from sdlora.models.architectures import ARCHITECTURES

# ComfyUI refuses headers above 1 MiB.
MAX_HEADER_BYTES = 1 << 20
_PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DTYPES_BY_NAME = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES = tuple(DTYPES_BY_NAME.values())
Spelling = Literal["kohya", "peft"]
FAMILIES = {architecture.text_width: architecture.modelspec for architecture in ARCHITECTURES.values()}
_BASE_VERSIONS = {architecture.text_width: architecture.base_version for architecture in ARCHITECTURES.values()}
_ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude",
    ".alpha": "alpha",
}  # fmt: skip
_KOHYA_KINDS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_FILE_NAMES = {"down": "a lora_down (lora_A)", "up": "a lora_up (lora_B)"}
# Hashes of the file, which are of other tensors as soon as a name changes; those of the base stay.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_OF_SINGLE_RANKS = ("sdlora.timestep_rank", "sdlora.frozen_start")
_OF_THE_BASE = {
    *(f"modelspec.{key}" for key in ("sai_model_spec", "architecture", "implementation", "resolution")),
    *(f"modelspec.{key}" for key in ("prediction_type", "trigger_phrase", "usage_hint")),
    *(f"ss_{key}" for key in ("base_model_version", "v2", "sd_model_name", "sd_model_hash", "new_sd_model_hash")),
    *(f"ss_{key}" for key in ("network_module", "clip_skip", "resolution")),
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file's content.

    Attributes:
        name: The file's name, for messages.
        state: Weights by kohya module name; alpha is NaN where the file tells none.
        metadata: Its metadata as it was.
        dtype: What the weights are stored in; float32 where they differ.
        spelling: "kohya", or "peft" for PEFT's and diffusers' dotted names.
    """

    name: str
    state: LoraState
    metadata: dict[str, str]
    dtype: torch.dtype
    spelling: Spelling


def read_file(path: Path, missing_alpha: str | None = None) -> LoraFile:
    """Read a LoRA file in which every module has an alpha.

    Args:
        path: The .safetensors file.
        missing_alpha: "rank" or a number, taken where the file tells no alpha; None to refuse such files.

    Raises:
        DataError: It cannot be read (see `read_tensors` and `parse_lora`), or has modules without alpha.
    """
    file = parse_lora(*read_tensors(path), name=path.name)
    unknown = [name for name, weights in file.state.items() if math.isnan(weights.alpha)]
    if not unknown:
        return file
    if missing_alpha is None:
        raise DataError(
            f"{path.name} lacks the alpha of {len(unknown)} modules, the first is {unknown[0]!r}, so that its strength "
            "is unknown. Ask whoever trained it, then say so: --missing-alpha rank (diffusers takes it so), or "
            "--missing-alpha NUMBER."
        )
    state = dict(file.state)
    for name in unknown:
        rank = float(state[name].down.shape[0])
        state[name] = replace(state[name], alpha=rank if missing_alpha == "rank" else _number(missing_alpha))
    return replace(file, state=state)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise DataError(f"--missing-alpha is {text!r}: it takes 'rank' or a number above 0.")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a small safetensors file.

    Raises:
        DataError: The file is not there, not safetensors, too large in its header, or holds anything but finite
            numbers.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() in _PICKLED:
        raise DataError(
            f"{path} is pickled, and a pickle can run any program when it is read. Ask for a .safetensors file, or "
            "convert it where nothing can be harmed: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "NEW_FILE)."
        )
    with path.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
    if not 0 < header_bytes <= min(MAX_HEADER_BYTES, path.stat().st_size):
        raise DataError(f"{path} is no LoRA that programs load: its header has {header_bytes} bytes.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}.") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"{path}: the tensor {key!r} ({tensor.dtype}) holds something other than finite numbers in float16, "
                "bfloat16 or float32."
            )
    return tensors, metadata


def parse_lora(tensors: Mapping[str, Tensor], metadata: dict[str, str], *, name: str) -> LoraFile:
    """Tensors in any of the three spellings as one form.

    Raises:
        DataError: A tensor is of no known kind, both kinds of spelling are in one file, a module lacks one of its two
            factors or has shapes that do not pair, or PEFT's metadata does not tell alphas that sdlora understands.
    """
    kohya = {key.startswith("lora_") for key in tensors}
    if len(kohya) > 1:
        raise DataError(f"{name} holds kohya's and diffusers' names at once; programs read only one of the two.")
    if not tensors:
        raise DataError(f"{name} holds no LoRA tensors.")
    dotted = kohya == {False}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, kind = _split_dotted(key, name) if dotted else _split_kohya(key, name)
        if kind in parts.setdefault(module, {}):
            raise DataError(f"{name} holds {module!r} twice, under different spellings.")
        parts[module][kind] = tensor
    settings = _peft_settings(metadata, name) if dotted else {}
    modules = {module: _weights(module, part, settings) for module, part in parts.items()}
    first = first_text_encoder(two=_has_two_text_encoders(modules))
    state = {kohya_name(module, first_text_encoder=first) if dotted else module: w for module, w in modules.items()}
    dtypes = {tensor.dtype for part in parts.values() for kind, tensor in part.items() if kind != "alpha"}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return LoraFile(name, state, metadata, dtype, "peft" if dotted else "kohya")


def _split_kohya(key: str, file: str) -> tuple[str, str]:
    module, _, ending = key.partition(".")
    module = diffusers_name(module)
    if ending == "dora_scale":
        raise DataError(f"{file}: {module!r} is DoRA under kohya's names, whose axis the file does not tell.")
    if ending not in _KOHYA_KINDS:
        raise DataError(f"{file}: the tensor {key!r} is not one of kohya's LoRA names; LoHa, LoKr and others are not.")
    return module, _KOHYA_KINDS[ending]


def _split_dotted(key: str, file: str) -> tuple[str, str]:
    """A dotted key as a module path of `sdlora.lora.targets` and what the tensor is."""
    ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
    # diffusers' oldest files hold a UNet's attention processors alone, without the network's name.
    bare = key.startswith(("down_blocks.", "mid_block.", "up_blocks."))
    if ending is None or not (bare or key.startswith(tuple(f"{network}." for network in NETWORKS))):
        raise DataError(f"{file}: the tensor {key!r} is not one of PEFT's or diffusers' LoRA names.")
    path = key.removesuffix(ending).removeprefix("unet.").replace(".processor.", ".")
    if network_of(path) == "unet":
        path = f"{path}.0" if path.endswith(".to_out") else path
    else:
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)
    return path, _ENDINGS[ending]


def _weights(module: str, part: dict[str, Tensor], settings: dict[str, Any]) -> LoraWeights:
    missing = [_FILE_NAMES[kind] for kind in _FILE_NAMES if kind not in part]
    if missing:
        raise DataError(f"The module {module!r} lacks {' and '.join(missing)}.")
    down, up, magnitude = part["down"], part["up"], part.get("magnitude")
    kernels_fit = down.dim() == up.dim() and down.dim() in (2, 4) and all(size == 1 for size in up.shape[2:])
    if not kernels_fit or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise DataError(f"The shapes of {module!r} do not pair: down {tuple(down.shape)}, up {tuple(up.shape)}.")
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise DataError(f"The shapes of {module!r} do not pair: {magnitude.numel()} magnitudes, up {tuple(up.shape)}.")
    if "alpha" not in part:
        alpha = _peft_alpha(settings, module, down.shape[0])
    elif part["alpha"].numel() == 1:
        alpha = float(part["alpha"])
    else:
        raise DataError(f"The shapes of {module!r} do not pair: alpha has {part['alpha'].numel()} numbers.")
    return LoraWeights(down.float(), up.float(), alpha, None if magnitude is None else magnitude.float())


def _peft_settings(metadata: dict[str, str], file: str) -> dict[str, Any]:
    try:
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except ValueError as error:
        raise DataError(f"{file}: {PEFT_METADATA} is not readable as JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file}: {PEFT_METADATA} is not a table of settings.")
    return settings


def _peft_alpha(settings: dict[str, Any], path: str, rank: int) -> float:
    """The alpha that PEFT's settings give a module; NaN if there are no settings."""
    if not settings:
        return math.nan
    network = network_of(path)
    name = path.removeprefix(f"{network}.")
    try:
        pattern = settings.get(f"{network}.alpha_pattern") or {}
        # PEFT takes the keys as regular expressions; names are all that diffusers writes.
        if odd := [key for key in pattern if not re.fullmatch(r"[\w.]+", key)]:
            raise DataError(f"{PEFT_METADATA}: alpha_pattern has {odd[0]!r}, and only names of modules are read.")
        own = next((alpha for key, alpha in pattern.items() if f".{name}".endswith(f".{key}")), None)
        alpha = float(settings[f"{network}.lora_alpha"] if own is None else own)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"The file's {PEFT_METADATA} does not tell the alpha of {network!r}.") from error
    # rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2312.03732, equation 3).
    return alpha * math.sqrt(rank) if settings.get(f"{network}.use_rslora") else alpha


def _has_two_text_encoders(modules: LoraState) -> bool:
    return any(network_of(path) == "text_encoder_2" for path in modules) or _width(modules) == 2048


def _width(state: LoraState) -> int | None:
    """How wide the text states are that cross-attention takes, whatever the spelling."""
    widths = {w.down.shape[1] for name, w in state.items() if re.search(r"attn2[._]to[._][kv]$", name)}
    return widths.pop() if len(widths) == 1 else None


def family_of(state: LoraState) -> str | None:
    """The family by ModelSpec's name, or how wide the text is if no family is known to have it; None if not told."""
    width = _width(state)
    if width is not None:
        return FAMILIES.get(width, f"text of width {width}")
    return FAMILIES[2048] if any(name.startswith(("lora_te1_", "lora_te2_")) for name in state) else None


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of all tensors in the order of their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode("utf-8"))
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metadata_of_new_ranks(files: list[LoraFile]) -> dict[str, str]:
    """What stays true of a LoRA whose ranks were computed anew from these files.

    Returns:
        Of one file all but what is said of single ranks. Of several what all say alike of base and trigger; their
        training figures are true of no sum.
    """
    first, *others = (file.metadata for file in files)
    if not others:
        return {key: value for key, value in first.items() if not key.startswith(_OF_SINGLE_RANKS)}
    return {
        key: value
        for key, value in first.items()
        if key in _OF_THE_BASE and all(other.get(key) == value for other in others)
    }


def write_file(
    path: Path,
    state: LoraState,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    paths: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA atomically: under kohya's names, or under PEFT's where the modules' paths are given.

    Args:
        path: The .safetensors file; it must not be there yet.
        state: Weights by kohya module name.
        metadata: What was said of them before; hashes, ranks and alphas are replaced by true ones.
        dtype: What to store the weights in; alphas are always float32.
        paths: Kohya module name to module path.

    Raises:
        DataError: The names and metadata make a header that programs refuse.
        ExportError: A number is too large for the type.
    """
    extra = {}
    if paths is None:
        tensors = kohya_tensors(state, authors_blocks=family_of(state) == FAMILIES[2048])
    else:
        tensors, extra[PEFT_METADATA] = to_peft({paths[name]: weights for name, weights in state.items()})
    tensors = in_type(tensors, dtype)
    header = _true_metadata(state, metadata, path.stem) | extra
    header["sshs_model_hash"] = tensors_sha256(tensors)
    header["modelspec.hash_sha256"] = "0x" + header["sshs_model_hash"]
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise DataError(f"{path.name} would have a header of {header_bytes} bytes, and programs read 1 MiB.")


def in_type(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A file's tensors in a type, its alphas as they are.

    Raises:
        ExportError: A number is too large for the type.
    """
    found = {key: t if key.endswith(".alpha") else t.to(dtype) for key, t in tensors.items()}
    if large := [key for key, tensor in found.items() if not bool(torch.isfinite(tensor).all())]:
        name = str(dtype).removeprefix("torch.")
        raise ExportError(f"The tensor {large[0]!r} holds numbers that {name} cannot; store bfloat16 or float32.")
    return found


def _true_metadata(state: LoraState, metadata: Mapping[str, str], title: str) -> dict[str, str]:
    gone = (*_HASHES, PEFT_METADATA, "format")
    header = {key: value for key, value in metadata.items() if key not in gone}
    header.setdefault("modelspec.sai_model_spec", "1.0.1")
    header.setdefault("modelspec.implementation", "https://github.com/Stability-AI/generative-models")
    header.setdefault("modelspec.title", title)
    header.setdefault("ss_output_name", title)
    width = _width(state)
    if width in FAMILIES:
        header.setdefault("modelspec.architecture", f"{FAMILIES[width]}/lora")
        header.setdefault("ss_base_model_version", _BASE_VERSIONS[width])
    ranks = [weights.down.shape[0] for weights in state.values()]
    alphas = [weights.alpha for weights in state.values()]
    header["ss_network_dim"] = str(max(set(ranks), key=ranks.count))
    header["ss_network_alpha"] = str(max(set(alphas), key=alphas.count))
    return header
