"""The reader of LoRA files of any trainer: every naming scheme becomes one form, and nothing is guessed or left out.

Three schemes are read: kohya's, PEFT's and diffusers' older one. Modules go by kohya's names in all of them, because
kohya's underscores cannot be turned back into dots without the network, and the reverse always works.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora.inject import NETWORKS, LoraState, LoraWeights, network_of
from sdlora.lora_files.algebra import update
from sdlora.lora_files.authors import by_diffusers_layers
from sdlora.lora_files.names import PEFT_METADATA, UNET_PREFIX, diffusers_name, kohya_name
from sdlora.models.architectures import ARCHITECTURES, Architecture, FamilyNames
from sdlora.models.families import FAMILIES

MAX_HEADER_BYTES = 1 << 20
"""The longest header that ComfyUI reads."""
_MAX_READ_BYTES = 100_000_000  # safetensors' own limit
_PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DTYPES_BY_NAME = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Spelling = Literal["kohya", "peft"]
BY_TEXT_WIDTH: dict[int | None, Architecture] = {family.text_width: family for family in ARCHITECTURES.values()}
_ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude",
    ".alpha": "alpha",
}  # fmt: skip
TRANSFORMER_PREFIXES = ("transformer.", "diffusion_model.")
# Other kinds of adapters by what their tensors' names contain.
_OTHER_KINDS = {
    r"^bundle_emb\.": "a bundle of a LoRA with textual inversions (A1111's bundle_emb)",
    r"\.hada_[wt]\d": "a LoHa",
    r"\.lokr_[wt]\d": "a LoKr",
    r"\.lora_mid\.": "a LoCon with a Tucker decomposition (lora_mid)",
    r"^oft_|\.oft_(blocks|diag)": "an OFT or BOFT",
    r"\.[abc][12](\.weight)?$": "a GLoRA",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a file of full differences or norms",
    r"\.on_input$": "an (IA)^3",
    r"\.(q_layer|p_layer|lambda_layer)\b": "a T-LoRA of its authors",
}
_KOHYA_KINDS = {"lora_down.weight": "down", "lora_up.weight": "up", "dora_scale": "scale", "alpha": "alpha"}
_FILE_NAMES = {"down": "lora_down (lora_A)", "up": "lora_up (lora_B)"}
# How `describe_lora` counts the UNet's modules.
_KINDS = {
    "cross_attention": r"_attn2_",
    "self_attention": r"_attn1_",
    "attention": r"_layers_\d+_attention_|_transformer_blocks_\d+_attn_",
    "mlp": r"_(ff_net|feed_forward|ff_linear|ff_context_linear)_",
    "projection": r"_proj_(in|out)$",
    "conv": r"_(resnets|downsamplers|upsamplers)_",
}


@dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file."""

    name: str
    state: LoraState  # weights by kohya module name; alpha is NaN where the file has none
    metadata: dict[str, str]
    dtype: torch.dtype  # dtype of the stored weights; float32 where they differ
    spelling: Spelling  # naming scheme: "kohya", or "peft" for the dotted names of PEFT and diffusers


def read_file(path: Path, missing_alpha: str | None = None) -> LoraFile:
    """Read a LoRA file in which every module has an alpha.

    Args:
        missing_alpha: "rank" or a number above 0, used where the file has no alpha; None refuses such files.

    Raises:
        DataError: The file cannot be read (see `read_tensors` and `parse_lora`), or modules have no alpha.
    """
    file = parse_lora(*read_tensors(path), name=path.name)
    if not (unknown := without_alpha(file)):
        return file
    if missing_alpha is None:
        raise DataError(
            f"{path.name}: {len(unknown)} modules have no alpha, the first is {unknown[0]!r}, so the LoRA's strength "
            "is unknown. Ask whoever trained it, then give --missing-alpha rank (what diffusers assumes) or "
            "--missing-alpha NUMBER."
        )
    try:
        alpha = 1.0 if missing_alpha == "rank" else float(missing_alpha)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha) or alpha <= 0:
        raise DataError(f"cannot use {missing_alpha!r} for --missing-alpha; give 'rank' or a number above 0")
    state = dict(file.state)
    for name in unknown:
        rank = float(state[name].down.shape[0])
        state[name] = replace(state[name], alpha=rank if missing_alpha == "rank" else alpha)
    return replace(file, state=state)


def without_alpha(file: LoraFile) -> list[str]:
    """The modules whose alpha is not in the file."""
    return [name for name, weights in file.state.items() if math.isnan(weights.alpha)]


def header_bytes(path: Path) -> int:
    """The length of a safetensors file's header, as its first eight bytes give it."""
    with path.open("rb") as handle:
        return int.from_bytes(handle.read(8), "little")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a small safetensors file.

    Raises:
        DataError: The file does not exist, is not safetensors, has too large a header, or holds values that are not
            finite or not float16, bfloat16 or float32.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist. Check the path.")
    if path.suffix.lower() in _PICKLED:
        raise DataError(
            f"{path} is a pickle, which can run any program when it is opened; sdlora reads .safetensors alone. Ask "
            "for a .safetensors file, or convert it on a machine where nothing can be harmed: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)."
        )
    if not 0 < (num_bytes := header_bytes(path)) <= min(_MAX_READ_BYTES, path.stat().st_size):
        raise DataError(
            f"{path} is not a safetensors file, or an incomplete one: its header has {num_bytes} bytes. Download it "
            "again, or ask for another file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"cannot read {path} as safetensors: {error}. Download or copy it again.") from error
    tensors = {key: _as_read(key, tensor) for key, tensor in stored.items()}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES_BY_NAME.values() or not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"{path}: the tensor {key!r} ({stored[key].dtype}) must hold finite values in float16, bfloat16, "
                "float32 or float64. The file is damaged, or its training diverged."
            )
    return tensors, metadata


def _as_read(key: str, tensor: Tensor) -> Tensor:
    """A tensor in one of the types that files are written in; some writers store alphas as integers."""
    is_alpha = key.endswith(".alpha") and tensor.dtype not in (torch.bool, *DTYPES_BY_NAME.values())
    return tensor.float() if tensor.dtype == torch.float64 or (is_alpha and not tensor.is_complex()) else tensor


def large_header_note(path: Path) -> str | None:
    """A sentence about a header that other programs do not read; None about any other."""
    num_bytes = header_bytes(path)
    if num_bytes <= MAX_HEADER_BYTES:
        return None
    return (
        f"{path.name} has a header of {num_bytes / 2**20:.1f} MiB, mostly metadata, but ComfyUI reads at most 1 MiB. "
        "sdlora convert writes a copy with less of it."
    )


def parse_lora(tensors: Mapping[str, Tensor], metadata: dict[str, str], *, name: str) -> LoraFile:
    """Turn tensors in any of the three naming schemes into one form.

    Raises:
        DataError: A tensor has no known name, both kinds of names are in one file, a module lacks one of its two
            factors or their shapes do not match, an alpha is not above 0, or PEFT's metadata does not give the alphas.
    """
    _refuse_other_kinds(tensors, name)
    kohya = {key.startswith(("lora_", "lycoris_")) for key in tensors}
    if len(kohya) > 1:
        raise DataError(f"{name} mixes kohya's and diffusers' tensor names; programs read only one of the two.")
    if not tensors:
        raise DataError(f"{name} contains no tensors.")
    dotted = kohya == {False}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, kind = _split_dotted(key, name) if dotted else _split_kohya(key, name)
        if kind in parts.setdefault(module, {}):
            raise DataError(f"{name} contains {module!r} twice, under different names.")
        parts[module][kind] = tensor
    settings = _peft_settings(metadata, name) if dotted else {}
    if dotted and not settings and all(key.startswith(TRANSFORMER_PREFIXES) for key in tensors):
        # Files of transformers have alpha / r in B, so that alpha is the rank, unless they say otherwise.
        for part in parts.values():
            if "down" in part:
                part.setdefault("alpha", torch.tensor(float(part["down"].shape[0])))
    layers = {theirs: ours for names in FAMILIES.values() for theirs, ours in names.lora_authors.items()}
    parts = by_diffusers_layers(parts, layers, dotted=dotted, file=name)
    what = f"{name} (a DyLoRA)" if "dylora" in metadata.get("ss_network_module", "") else name
    state = {module: _weights(module, part, settings, what) for module, part in parts.items()}
    if dotted:
        two = any(network_of(path) == "text_encoder_2" for path in state) or text_width(state) == 2048
        state = {kohya_name(path, two_text_encoders=two): weights for path, weights in state.items()}
    dtypes = {tensor.dtype for part in parts.values() for kind, tensor in part.items() if kind != "alpha"}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return LoraFile(name, state, metadata, dtype, "peft" if dotted else "kohya")


def _refuse_other_kinds(tensors: Mapping[str, Tensor], file: str) -> None:
    for pattern, kind in _OTHER_KINDS.items():
        if (key := next((key for key in tensors if re.search(pattern, key)), None)) is not None:
            raise DataError(
                f"{file} is {kind}, by its tensor {key!r}. sdlora reads LoRA and DoRA alone: use this file in the "
                "program that it was made for, or merge it into a base model there."
            )


def _split_kohya(key: str, file: str) -> tuple[str, str]:
    module, _, ending = key.partition(".")
    # OneTrainer and LyCORIS have prefixes of their own for transformers' modules.
    module = diffusers_name(re.sub(r"^(lora_transformer|lycoris)_", UNET_PREFIX, module))
    if ending not in _KOHYA_KINDS:
        raise DataError(f"{file}: the tensor {key!r} is not part of a LoRA under kohya's names.")
    return module, _KOHYA_KINDS[ending]


def _split_dotted(key: str, file: str) -> tuple[str, str]:
    """A dotted key as a module path of `sdlora.lora.inject` and the kind of tensor."""
    ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
    # diffusers' oldest files hold a UNet's attention processors alone, without the network's name.
    bare = key.startswith(("down_blocks.", "mid_block.", "up_blocks.", *TRANSFORMER_PREFIXES))
    if ending is None or not (bare or key.startswith(tuple(f"{network}." for network in NETWORKS))):
        raise DataError(
            f"{file}: the tensor {key!r} is not part of a LoRA under PEFT's or diffusers' names. sdlora reads LoRA and "
            f"DoRA of {', '.join(NETWORKS)}."
        )
    path = key.removesuffix(ending).replace(".processor.", ".")
    for prefix in ("unet.", *TRANSFORMER_PREFIXES):
        path = path.removeprefix(prefix)
    if network_of(path) == "unet":
        # In diffusers' older names of UNets; a transformer's layer may be called so.
        is_older = path.endswith(".to_out") and not key.startswith(TRANSFORMER_PREFIXES)
        path = f"{path}.0" if is_older else path
    else:
        path = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", path)
    return path, _ENDINGS[ending]


def _weights(module: str, part: dict[str, Tensor], settings: dict[str, Any], file: str) -> LoraWeights:
    if missing := [_FILE_NAMES[kind] for kind in _FILE_NAMES if kind not in part]:
        raise DataError(f"{file}: the module {module!r} has no {' and no '.join(missing)} tensor.")
    down, up, magnitude = part["down"], part["up"], part.get("magnitude", part.get("scale"))
    kernels_fit = down.dim() == up.dim() and down.dim() in (2, 4) and all(size == 1 for size in up.shape[2:])
    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    if not kernels_fit or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise DataError(f"{file}: the shapes of {module!r} do not match: {shapes}.")
    # LyCORIS keeps the axis that magnitudes are of: (o, 1) for outputs, as in the paper and here, or (1, i) for inputs.
    if "scale" in part and part["scale"].dim() > 1 and part["scale"].shape[:2] == (1, down.shape[1]) != (1, 1):
        raise DataError(
            f"{file}: {module!r} is a DoRA with a magnitude for each input (dora_scale of the shape "
            f"{tuple(part['scale'].shape)}), as LyCORIS makes them unless wd_on_output is set. sdlora computes and "
            "trains a magnitude for each output, which no such file can be turned into. To build on this LoRA, merge "
            "it into the base model with the program that trained it."
        )
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise DataError(f"{file}: the shapes of {module!r} do not match: {shapes}, {magnitude.numel()} magnitudes.")
    if "alpha" not in part:
        alpha = _peft_alpha(settings, module, down.shape[0], file)
    elif part["alpha"].numel() == 1:
        alpha = float(part["alpha"])
    else:
        raise DataError(f"{file}: the alpha of {module!r} must be one number, found {part['alpha'].numel()}.")
    if not (0 < alpha < math.inf or ("alpha" not in part and not settings)):
        raise DataError(f"{file}: the alpha of {module!r} is {alpha:g}; it must be a finite number above 0.")
    if magnitude is not None:
        magnitude = magnitude.float().reshape((1, -1, 1, 1) if down.dim() == 4 else (-1,))
    return LoraWeights(down.float(), up.float(), alpha, magnitude)


def _peft_settings(metadata: dict[str, str], file: str) -> dict[str, Any]:
    try:
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: the metadata entry {PEFT_METADATA} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file}: the metadata entry {PEFT_METADATA} must be a JSON object.")
    return settings


def _peft_alpha(settings: dict[str, Any], path: str, rank: int, file: str) -> float:
    """The alpha that PEFT's settings give a module; NaN if there are no settings."""
    if not settings:
        return math.nan
    network = network_of(path)
    name = path.removeprefix(f"{network}.")
    if network == "unet" and "transformer.lora_alpha" in settings:
        network = "transformer"
    try:
        pattern = settings.get(f"{network}.alpha_pattern") or {}
        # PEFT takes the keys as regular expressions; diffusers writes plain names alone.
        if expressions := [key for key in pattern if not re.fullmatch(r"[\w.]+", key)]:
            raise DataError(
                f"{file}: {PEFT_METADATA} has the alpha_pattern {expressions[0]!r}; sdlora reads plain module names, "
                "not regular expressions."
            )
        own = next((alpha for key, alpha in pattern.items() if f".{name}".endswith(f".{key}")), None)
        alpha = float(settings[f"{network}.lora_alpha"] if own is None else own)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{file}: {PEFT_METADATA} has no valid {network}.lora_alpha.") from error
    # rsLoRA scales by alpha / sqrt(r) (Kalajdzievski 2312.03732, equation 3).
    return alpha * math.sqrt(rank) if settings.get(f"{network}.use_rslora") else alpha


def text_width(state: LoraState) -> int | None:
    """Width of the text embeddings that cross-attention takes, under any naming scheme; None if not known."""
    widths = {w.down.shape[1] for name, w in state.items() if re.search(r"attn2[._]to[._][kv]$", name)}
    return widths.pop() if len(widths) == 1 else None


def family_of(state: LoraState, metadata: Mapping[str, str] | None = None) -> str | None:
    """ModelSpec's name of the family, or "text of width N" of an unknown one; None if nothing tells.

    The modules decide; where they do not tell, as convolutions alone do not, `metadata` does.
    """
    widths = {weights.down.shape[1] for weights in state.values()}
    for names in FAMILIES.values():
        is_marked = any(re.match(names.lora_mark, name) for name in state)
        if is_marked and (names.lora_width is None or names.lora_width in widths):
            return names.modelspec
    if (width := text_width(state)) is not None:
        family = BY_TEXT_WIDTH.get(width)
        return f"text of width {width}" if family is None else family.modelspec
    if any(name.startswith(("lora_te1_", "lora_te2_")) for name in state):
        return ARCHITECTURES["sdxl"].modelspec
    said = metadata or {}
    architecture, version = said.get("modelspec.architecture", ""), said.get("ss_base_model_version", "")
    for names in FAMILIES.values():
        if architecture.startswith(names.modelspec) or version.startswith(names.base_version.split("_base")[0]):
            return names.modelspec
    return None


def transformer_family(state: LoraState, metadata: Mapping[str, str] | None = None) -> FamilyNames | None:
    """The family of a transformer's LoRA; None of a UNet's."""
    name = family_of(state, metadata)
    return next((f for f in FAMILIES.values() if f.modelspec == name and f.lora_prefix is not None), None)


def describe_lora(path: Path) -> dict[str, Any]:
    """What a LoRA file of any trainer contains, as JSON values.

    Raises:
        DataError: It cannot be read.
    """
    file = parse_lora(*read_tensors(path), name=path.name)
    state, metadata = file.state, file.metadata
    modules: Counter[str] = Counter()
    for name in state:
        kind = next((kind for kind, mark in _KINDS.items() if re.search(mark, name)), "other")
        modules[kind if name.startswith(UNET_PREFIX) else "text_encoder"] += 1
    unknown = any(math.isnan(weights.alpha) for weights in state.values())
    dora, frozen_start = any(w.magnitude is not None for w in state.values()), "sdlora.frozen_start" in metadata
    factors = [factor for w in state.values() for factor in (w.down, w.up, w.magnitude) if factor is not None]
    num_parameters = sum(factor.numel() for factor in factors)
    norm = math.sqrt(sum(float(torch.linalg.matrix_norm(update(weights))) ** 2 for weights in state.values()))
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "names": file.spelling,
        "family": family_of(state, metadata),
        "dtype": str(file.dtype).removeprefix("torch."),
        "title": metadata.get("modelspec.title"),
        "architecture": metadata.get("modelspec.architecture"),
        "base": metadata.get("ss_sd_model_name"),
        "trigger": metadata.get("modelspec.trigger_phrase"),
        "ranks": sorted({weights.down.shape[0] for weights in state.values()}),
        "alphas": "not in the file" if unknown else sorted({weights.alpha for weights in state.values()}),
        "modules": dict(modules),
        "dora": dora,
        "frozen_start": frozen_start,
        "timestep_rank_min": metadata.get("sdlora.timestep_rank_min"),
        # Half of the ranks of such a file are the frozen initial factors.
        "parameters": num_parameters // 2 if frozen_start else num_parameters,
        # The norm of a DoRA's update depends on the base.
        "update_norm": None if unknown or dora else round(norm, 6),
        "metadata": metadata,
    }
