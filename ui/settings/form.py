"""The form: every option of the schema as a field, and what is filled in as a configuration.

Pure. Names, help, limits and defaults are `sdlora.config.schema`'s own, so that page and command line
cannot differ.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from sdlora.common.files import parse_toml
from sdlora.common.selectors import KINDS
from sdlora.config.prompt_lines import as_line
from sdlora.config.schema import RunConfig, Target
from sdlora.config.schema_training import OPTIMIZERS
from sdlora.config.toml import option_fields, options, parse_config, toml_value
from sdlora.errors import ConfigError

Kind = Literal["switch", "choice", "choices", "whole", "number", "text", "lines", "toml"]
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)

TITLES = {
    "": "The run", "base": "Base model", "data": "Images and captions", "lora": "Size and layers", "train": "Training",
    "timesteps": "Timesteps", "loss": "Loss", "preview": "Previews", "copycheck": "Copy check", "file": "LoRA file",
    "cache": "Cache",
}  # fmt: skip
"""What the groups of options are called, by section."""

# Where the last part of an option's name says too little without its section.
_LABELS = {
    "lora.init": "Initial values", "lora.from_file": "Continue from a LoRA file", "base.merge": "Merge LoRA files",
    "base.components": "Other parts from", "base.text_encoder": "Text encoder", "base.vae": "VAE",
    "preview.base": "Draw with a distilled model",
    "preview.base_steps": "Steps of the distilled model",
    "timesteps.min": "Lowest timestep", "timesteps.max": "Highest timestep", "timesteps.mean": "Mean of logit normal",
    "timesteps.std": "Deviation of logit normal", "loss.kind": "Kind of loss", "preview.enabled": "Draw previews",
    "copycheck.enabled": "Check for copies", "copycheck.stop": "Stop when an epoch copies",
    "copycheck.sscd": "Check with SSCD", "copycheck.dinov2": "Choose the epoch with DINOv2",
    "copycheck.parts": "Look for parts of images",
    "file.format": "Names of tensors", "file.precision": "Precision of the file", "cache.dir": "Folder of the cache",
    "data.trigger": "Trigger word", "base.path": "Base model", "data.folder": "Set of images",
    "name": "Name of the run", "data.sets": "Several sets of images", "data.caption": "Caption of images without one",
    "lora.dora": "DoRA", "lora.rslora": "Rank-stabilised scale (rsLoRA)", "train.ema_decay": "EMA decay",
    "train.lr_schedule": "Learning rate schedule", "train.max_grad_norm": "Clip gradients at",
    "train.loraplus_lr_ratio": "LoRA+ ratio of learning rates", "file.licence": "Licence",
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One option, as it is shown."""

    name: str  # dotted, as in files and after `--set`
    kind: Kind  # which control shows it; "lines" is a list of texts, a line each, and "toml" anything else
    help: str
    default: Any
    optional: bool = False  # whether it may be left empty, which means None
    choices: tuple[str, ...] = ()  # of "choice" and "choices"
    open: bool = False  # whether others than the choices can be written
    minimum: float | None = None  # the lowest value, itself allowed or not; None if there is no limit
    maximum: float | None = None  # the highest

    @property
    def section(self) -> str:
        """Which table of a file it stands in; empty for the top."""
        return self.name.rpartition(".")[0]

    @property
    def label(self) -> str:
        """Its name in words."""
        if self.name in _LABELS:
            return _LABELS[self.name]
        words = self.name.rpartition(".")[2].removesuffix("_px").removesuffix("_steps").replace("_", " ")
        unit = " (px)" if self.name.endswith("_px") else ""
        return words[0].upper() + words[1:] + unit


def fields() -> list[Field]:
    """Every option of the schema, in its order."""
    return [_field(name, value) for name, value in options(RunConfig())]


def sections() -> dict[str, str]:
    """What every section is about, by its name."""
    found = {"": "The run"}
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found[name] = (info.annotation.__doc__ or name).strip().rstrip(".")
    return found


def shown(field: Field, value: Any) -> Any:
    """A value as its control holds it."""
    if value is None:
        return None if field.kind == "choice" else ""
    if field.kind in ("whole", "number"):
        return digits(value)
    if field.kind == "lines":
        return "\n".join(as_line(entry) if isinstance(entry, dict) else entry for entry in value)
    if field.kind == "toml":
        return _toml(value)
    return value


def entered(field: Field, value: Any) -> Any:
    """What a control holds as a value of the schema; what cannot be one is left for the schema to refuse.

    Raises:
        ConfigError: It is no number or no TOML, where that is asked for.
    """
    if field.kind == "lines":
        return [line.strip() for line in str(value or "").splitlines() if line.strip()]
    if field.kind == "toml":
        return _from_toml(field, str(value or "").strip())
    if value is None or (value == "" and field.kind != "choice"):
        return None if field.optional else field.default
    return _number(field, str(value).strip()) if field.kind in ("whole", "number") else value


def to_document(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their dotted names as nested tables, those left out that are at their defaults."""
    defaults = {field.name: field.default for field in fields()}
    document: dict[str, Any] = {}
    for name, value in values.items():
        if value == defaults[name] and isinstance(value, bool) == isinstance(defaults[name], bool):
            continue
        section, _, key = name.rpartition(".")
        (document.setdefault(section, {}) if section else document)[key] = value
    return document


def make_config(values: Mapping[str, Any], name: str) -> RunConfig:
    """A whole configuration of what was filled in.

    Raises:
        ConfigError: Anything is wrong; all faults are named at once.
    """
    return parse_config(to_document(values), name=name)


def _field(name: str, default: Any) -> Field:
    info = option_fields()[name]
    annotation, optional = info.annotation, False
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [one for one in get_args(annotation) if one is not type(None)]
        annotation, optional = (rest[0], True) if len(rest) == 1 else (annotation, False)
    limits = {type(limit): limit for limit in info.metadata}
    low = limits[Ge].ge if Ge in limits else limits[Gt].gt if Gt in limits else None
    high = limits[Le].le if Le in limits else limits[Lt].lt if Lt in limits else None
    kind, choices = _kind(annotation)
    is_open = annotation == list[Target] or name == "train.optimizer"
    if name == "train.optimizer":
        kind, choices = "choice", OPTIMIZERS
    return Field(name, kind, info.description or "", default, optional, choices, is_open, low, high)


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return "switch", ()
    if origin is Literal:
        return "choice", tuple(inner)
    if origin is list and get_origin(inner[0]) is Literal:
        return "choices", tuple(get_args(inner[0]))
    if annotation == list[Target]:
        return "choices", KINDS
    if origin is list and _holds_text(inner[0]):
        return "lines", ()
    if annotation is int:
        return "whole", ()
    if annotation is float:
        return "number", ()
    return ("text", ()) if annotation is str else ("toml", ())


def _holds_text(annotation: Any) -> bool:
    return annotation is str or any(map(_holds_text, get_args(annotation)))


def digits(value: Any) -> str:
    """A number without an exponent, as people write it."""
    text = format(Decimal(str(value)), "f") if isinstance(value, (int, float)) else str(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _number(field: Field, text: str) -> Any:
    """A number that was typed, with a decimal point or comma.

    Browsers drop a comma in a field for numbers, which would make 1 of "0,001"; so these are fields for text.
    """
    if field.kind == "whole":
        if _WHOLE.fullmatch(text):
            return int(text)
        raise ConfigError(f"{field.name}: {text!r} is not a whole number. Write it in digits alone, such as 1000.")
    if _NUMBER.fullmatch(text):
        return float(text.replace(",", "."))
    raise ConfigError(
        f"{field.name}: {text!r} is not a number. Write it like 0.001, without spaces or thousands' marks."
    )


def _toml(value: Any) -> str:
    text = toml_value(value)
    return text[1:-1] if isinstance(value, (dict, list)) else text


def _from_toml(field: Field, text: str) -> Any:
    if not text:
        return field.default
    wrapped = f"{{{text}}}" if isinstance(field.default, dict) else text
    wrapped = f"[{text}]" if isinstance(field.default, list) else wrapped
    try:
        return parse_toml(f"value = {wrapped}")["value"]
    except ValueError as error:
        example = _toml(field.default) or "name = 4"
        found = repr(text if len(text) <= 200 else f"{text[:200]}…")
        raise ConfigError(f"{field.name}: {found} cannot be read ({error}). Write it like this: {example}") from error
