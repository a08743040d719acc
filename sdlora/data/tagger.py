"""Booru tags of images by a tagger of the WD14 family, as captions for base models that are prompted in tags.

A tagger gives every tag of its `selected_tags.csv` a probability; `captioner` writes the captions made of them.
Shapes: S width and height of the tagger's input in pixels, n number of tags.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the HTTP library's own
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError

from sdlora.errors import BaseModelError, ConfigError

TAGS_FILE = "selected_tags.csv"
OPTIONAL_CATEGORIES = ("rating", "artist", "copyright")
# Danbooru's numbers, and 9 for the ratings. Its meta tags, 5, say nothing that is seen in an image.
_CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "9": "rating"}
_ORDER = ("artist", "character", "copyright", "general", "rating")
# The files of a model by the package that runs it, the preferred package first.
_WEIGHTS = {"onnxruntime": ("model.onnx",), "timm": ("config.json", "model.safetensors")}
# Comes with models that need another preprocessing (imgutils' format), which is not guessed at.
_OTHER_FORM = "preprocess.json"
_MAX_SIDE_PX = 8192


class Tag(NamedTuple):
    """A tag as its file has it, with underscores; the category is a word of `_CATEGORIES` or another number."""

    name: str
    category: str


@dataclass(frozen=True)
class Network:
    """A network that tags images.

    Attributes:
        size_px: S.
        probabilities: From RGB pixels, (S, S, 3) uint8, to the probabilities of all tags, (n,) in [0, 1].
    """

    size_px: int
    probabilities: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class TagSettings:
    """Which tags a caption is made of.

    Attributes:
        general_threshold: The lowest probability of general tags that are written, in [0, 1].
        character_threshold: The same for characters, artists and copyrights.
        trigger: Written in front.
        include: Categories beside general tags and characters, of `OPTIONAL_CATEGORIES`.
        exclude: Tags that are never written, with spaces or underscores.
    """

    general_threshold: float = 0.35
    character_threshold: float = 0.85
    trigger: str | None = None
    include: frozenset[str] = frozenset()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tagger:
    """A loaded tagger."""

    network: Network
    tags: Sequence[Tag]
    settings: TagSettings

    def caption(self, image: Image.Image) -> str:
        """The tags of an RGB image on one line.

        Raises:
            BaseModelError: The network has more or fewer outputs than there are tags.
        """
        probabilities = self.network.probabilities(np.asarray(pad_to_square(image, self.network.size_px)))
        if probabilities.shape != (len(self.tags),):
            raise BaseModelError(
                f"The tagger has outputs of shape {list(probabilities.shape)} for the {len(self.tags)} tags of its "
                f"{TAGS_FILE}. Use the files of one model."
            )
        return caption_from_tags(self.tags, probabilities.tolist(), self.settings)


def pad_to_square(image: Image.Image, size_px: int) -> Image.Image:
    """Pad an RGB image with white to a square around it, and scale that to S by S, bicubically.

    Source: the preprocessing of SmilingWolf/wd-tagger on the Hub.
    """
    if max(image.size) > _MAX_SIDE_PX:  # the square of a long strip would not fit into memory
        image = image.copy()
        image.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.BICUBIC)
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size_px, size_px), Image.Resampling.BICUBIC)


def caption_from_tags(tags: Sequence[Tag], probabilities: Sequence[float], settings: TagSettings) -> str:
    """The caption: trigger, artists, characters, copyrights, general tags, rating, each by descending probability.

    Of the ratings the most probable is written, whatever its probability.
    """
    ranked = sorted(zip(tags, probabilities, strict=True), key=lambda entry: -entry[1])
    words = [settings.trigger] if settings.trigger else []
    left_out = {plain_name(tag).casefold() for tag in (*settings.exclude, *words)}
    for category in _ORDER:
        if category in OPTIONAL_CATEGORIES and category not in settings.include:
            continue
        threshold = settings.general_threshold if category == "general" else settings.character_threshold
        group = [(tag.name, probability) for tag, probability in ranked if tag.category == category]
        chosen = group[:1] if category == "rating" else [entry for entry in group if entry[1] >= threshold]
        words += [word for name, _ in chosen if (word := plain_name(name)).casefold() not in left_out]
    return ", ".join(words)


def plain_name(name: str) -> str:
    """A tag with spaces for underscores; kaomoji such as `^_^`, at most one letter on each side, keep them."""
    if all(sum(map(str.isalnum, side)) <= 1 for side in name.split("_")):
        return name
    return name.replace("_", " ")


def read_tags(file: Path) -> list[Tag]:
    """The tags of a `selected_tags.csv`, in the order of the network's outputs.

    Raises:
        BaseModelError: It has no columns `name` and `category`, or no rows.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        tags = [Tag(row["name"], _CATEGORIES.get(row["category"], row["category"])) for row in rows]
    except (UnicodeDecodeError, csv.Error, KeyError) as error:
        raise BaseModelError(f"{file}: not a list of tags with the columns name and category ({error}).") from error
    if not tags or any(None in tag for tag in tags):
        raise BaseModelError(f"{file}: empty or truncated. Download it again.")
    return tags


def check_settings(tags: Sequence[Tag], settings: TagSettings) -> None:
    """Refuse settings that name what the tags do not have, all at once.

    Raises:
        ConfigError: They name a category to include or a tag to exclude that is not among the tags.
    """
    categories = {tag.category for tag in tags}
    faults = [f"it has no tags of the category {name!r}" for name in sorted(settings.include - categories)]
    names = {plain_name(tag.name).casefold() for tag in tags}
    for tag in settings.exclude:
        if (word := plain_name(tag).casefold()) not in names:
            near = difflib.get_close_matches(word, names, n=1)
            faults.append(f"it has no tag {tag!r} to exclude" + (f"; did you mean {near[0]!r}?" if near else ""))
    if faults:
        raise ConfigError(f"{TAGS_FILE} of the tagger does not fit the options: " + "; ".join(faults))


def load_tagger(model: str, settings: TagSettings, *, device: torch.device) -> Tagger:
    """Load a tagger from a Hub id or a folder: a `selected_tags.csv` beside a `model.onnx`, or beside timm's files.

    Raises:
        BaseModelError: It cannot be loaded, is of another form, or needs a package that is not installed.
        ConfigError: The settings name categories or tags that it does not have.
    """
    installed = [package for package in _WEIGHTS if importlib.util.find_spec(package) is not None]
    if not installed:
        raise BaseModelError(
            "A tagger needs onnxruntime or timm. Install one: pip install 'sdlora[tagger]', or pip install timm."
        )
    for package in installed:
        folder = _find_folder(model, [TAGS_FILE, _OTHER_FORM, *_WEIGHTS[package]])
        if (folder / _OTHER_FORM).is_file():
            raise BaseModelError(f"The tagger {model!r} has a {_OTHER_FORM}, so it is not of the WD14 family.")
        if all((folder / name).is_file() for name in (TAGS_FILE, *_WEIGHTS[package])):
            tags = read_tags(folder / TAGS_FILE)
            check_settings(tags, settings)
            network = _load_onnx(folder, device) if package == "onnxruntime" else _load_timm(folder, device)
            return Tagger(network, tags, settings)
    forms = " or ".join(" and ".join(_WEIGHTS[package]) + f" (for {package})" for package in _WEIGHTS)
    raise BaseModelError(
        f"The tagger {model!r} is not complete: it needs {TAGS_FILE}, and {forms}. Installed: {', '.join(installed)}."
    )


def _find_folder(model: str, files: Sequence[str]) -> Path:
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except (OSError, ValueError, HTTPError) as error:
        raise BaseModelError(
            f"The tagger {model!r} could not be loaded: {str(error).strip().splitlines()[0]} Check its name and the "
            "network connection, and that HF_HUB_OFFLINE is not set. An example is SmilingWolf/wd-vit-tagger-v3."
        ) from error


def _load_onnx(folder: Path, device: torch.device) -> Network:
    """The network in `model.onnx`: BGR pixels from 0 to 255, (1, S, S, 3), to probabilities, (1, n)."""
    runtime: Any = importlib.import_module("onnxruntime")
    native: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    # Its exceptions have no base of their own.
    faults = tuple(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception))
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in runtime.get_available_providers()]
    try:
        session = runtime.InferenceSession(str(folder / "model.onnx"), providers=providers)
    except faults as error:
        raise BaseModelError(f"{folder / 'model.onnx'} could not be loaded: {error}") from error
    inputs = session.get_inputs()
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
        raise BaseModelError(
            f"{folder / 'model.onnx'} takes inputs of the shapes {[each.shape for each in inputs]}; a tagger of the "
            "WD14 family takes [1, 448, 448, 3], or another square."
        )

    def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = np.ascontiguousarray(pixels[None, :, :, ::-1], dtype=np.float32)
        found: NDArray[np.float32] = session.run(None, {inputs[0].name: batch})[0][0]
        return found

    return Network(shape[1], probabilities)


def _load_timm(folder: Path, device: torch.device) -> Network:
    """The network in timm's files: pixels normalised as its configuration says, then BGR, (1, 3, S, S), to logits."""
    timm: Any = importlib.import_module("timm")
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
        form = network.pretrained_cfg
        size_px, mean, std = form["input_size"][-1], torch.tensor(form["mean"]), torch.tensor(form["std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"timm could not load the tagger in {folder}: {error}") from error

    @torch.no_grad()
    def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = (torch.from_numpy(pixels.astype(np.float32)) / 255 - mean) / std
        batch = scaled.flip(-1).permute(2, 0, 1).unsqueeze(0).contiguous()
        found: NDArray[np.float32] = torch.sigmoid(network(batch.to(device)))[0].float().cpu().numpy()
        return found

    return Network(size_px, probabilities)
