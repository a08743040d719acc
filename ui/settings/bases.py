"""Base models before they are loaded: which there are, what is wrong with a name, their shapes and their presets.

Only headers and configurations of files are read.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sdlora.common.bundled import BUILTIN_BASES, builtin_base
from sdlora.common.families import Family
from sdlora.errors import BaseModelError, ConfigError, SdloraError
from sdlora.estimate.meta_model import Shapes, shapes_of_configs, shapes_on_disk
from sdlora.models.architectures import Identified, read_header
from sdlora.models.families import FAMILIES, family_on_disk, identify_base
from sdlora.models.network_file import check_readable

from ..state.folders import Studio
from ..state.locations import check_model, to_path

POCKET = "pocket"
_USUAL_PX = 512
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_ANIME = ("illustrious", "noob", "anime", "animagine")  # in the names of bases that are prompted in Danbooru tags


def known_bases(studio: Studio) -> list[str]:
    """The base models to choose from: the built-in ones, `bases` in the studio's folder, and the hub's cache."""
    own = studio.runs / "bases"
    files = sorted(own.iterdir()) if own.is_dir() else []
    found = [str(f.resolve()) for f in files if f.suffix == ".safetensors" or (f / "model_index.json").is_file()]
    try:
        repos = scan_cache_dir().repos if studio.any_folder else ()
    except CacheNotFound:
        repos = ()
    cached = sorted(repo.repo_id for repo in repos if _cached(repo.repo_id) is not None)
    return [*BUILTIN_BASES, *found, *cached]


def check_base(studio: Studio, path: str) -> None:
    """Check that a base model exists, as far as that can be known without loading or downloading it.

    Raises:
        ConfigError: It is neither a base model on this machine nor the name of one on the Hub, or may not be read.
    """
    if path in BUILTIN_BASES:
        return
    check_model(studio, path)
    place = _local(path)
    if place is None and _is_hub_id(path):
        return
    if place is None:
        raise ConfigError(
            f"There is no base model {path!r} on this machine. Choose one from the list, or enter the path of a "
            ".safetensors checkpoint, that of a diffusers folder, or a model of the Hugging Face Hub as owner/name."
        )
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise ConfigError(
            f"The folder {path!r} is not a base model: it has no model_index.json. Choose the folder of a model in "
            "diffusers' layout, or a .safetensors checkpoint."
        )
    if place.is_file():
        try:
            _identified(place)
        except BaseModelError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(f"{path!r} cannot be read: {error.strerror}.") from error


def shapes_of(path: str) -> Shapes | None:
    """The shapes of a base model; None if it is not on this machine, or not known before it is loaded."""
    folder = _place(path)
    try:
        if folder.is_file():
            found = _identified(folder)
            shape = found.architecture
            return shapes_of_configs(found.family, shape.unet, shape.vae, shape.text_encoders)
        return shapes_on_disk(folder)
    except (OSError, ValueError, KeyError, SdloraError):
        return None  # loading it says what is wrong


def base_resolution_px(path: str) -> int:
    """The size that a base model was trained at, by its files; 512 for one that is not on this machine."""
    shapes = shapes_of(path)
    return _USUAL_PX if shapes is None else shapes.resolution_px


def family_of(path: str) -> Family | None:
    """The family of a base model; None if it is not on this machine, or not known."""
    place = _place(path)
    try:
        return _identified(place).family if place.is_file() else family_on_disk(str(place))
    except (OSError, RuntimeError, BaseModelError):
        return None


def preset_family(path: str) -> str | None:
    """What the names of a base model's presets begin with, such as "sdxl"; None if it has none, or is not known."""
    family = family_of(path)
    if family != "sdxl":
        return None if family is None else FAMILIES[family].presets
    if _prediction_type(_place(path)) == "v_prediction":
        return "noobai-v"
    name = (path if (place := _local(path)) is None else place.name).lower()
    return "illustrious" if any(mark in name for mark in _ANIME) else "sdxl"


def describe_base(path: str) -> str:
    """What a base model is and which recipe that gives, as a sentence."""
    if path in BUILTIN_BASES:
        return "A small base model that comes with sdlora, to try everything on: training takes minutes."
    family = family_of(path)
    if family is None and _local(path) is not None:
        return "Its family is not known before it is loaded, so the recipe is general: compare the settings under More."
    if family is None:
        return (
            "It is not on this machine and is downloaded when the run starts. Its family is not known until then, so "
            "the recipe is general: choose the model again after the download."
        )
    title = FAMILIES[family].title
    if preset_family(path) is None:
        return f"{title}. There is no recipe for this family yet, so the settings are general."
    kind = {"illustrious": ", prompted in tags", "noobai-v": " with v-prediction, prompted in tags"}
    return f"{title}{kind.get(preset_family(path) or '', '')}."


def _identified(file: Path) -> Identified:
    facts = file.stat()
    return _read_header(file, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=16)
def _read_header(file: Path, _modified_ns: int, _size: int) -> Identified:
    check_readable(file, file.name)
    return identify_base(read_header(file), file.name)


def _prediction_type(place: Path) -> str | None:
    if place.is_file():
        return _identified(place).prediction_type
    try:
        scheduler = json.loads((place / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return scheduler.get("prediction_type") if isinstance(scheduler, dict) else None


def _place(path: str) -> Path:
    """Where a base model lies, or would lie: its folder, a path, or a hub id's folder in the hub's cache."""
    return builtin_base(path) or _local(path) or _cached(path) or Path(path)


def _local(path: str) -> Path | None:
    """The file or folder of this name; None if there is none, or if it is no path at all."""
    try:
        place = to_path(path)
    except ConfigError:
        return None
    return place if place.exists() else None


def _is_hub_id(path: str) -> bool:
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return path.count("/") == 1 and not path.endswith(_WEIGHTS)


def _cached(repository: str) -> Path | None:
    """A model's folder in the hub's cache; None if it is not there."""
    try:
        found = try_to_load_from_cache(repository, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
