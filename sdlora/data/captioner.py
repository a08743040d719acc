"""Captions for images that have none, written by a model of the user's choice into `.txt` files beside them.

Any image-to-text model of transformers' own classes will do; code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sdlora.common.files import write_text
from sdlora.data.captions import read_captions
from sdlora.data.checks import examine
from sdlora.data.images import load_image
from sdlora.errors import BaseModelError, DataError
from sdlora.events import Event, Notice, Progress

QUESTION = "Describe this image in one short sentence."


class Captioner:
    """A loaded image-to-text model.

    Args:
        model: A hub id, or a folder.
        device: Where to compute.
        prompt: What a chat model is asked; what captions of other models begin with. A chat model is asked for one
            sentence if None.
        max_tokens: The longest caption.

    Raises:
        BaseModelError: It cannot be had, or is of no kind that writes captions.
    """

    def __init__(self, model: str, *, device: torch.device, prompt: str | None = None, max_tokens: int = 60) -> None:
        self._name, self._device, self._prompt, self._max_tokens = model, device, prompt, max_tokens
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            self._model: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto" if device.type == "cuda" else torch.float32,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise BaseModelError(
                f"The captioner {model!r} cannot be had: {_first_line(error)} Check its name and the network (and that "
                "HF_HUB_OFFLINE is not set); it must be an image-to-text model with .safetensors weights that "
                "transformers knows by itself, such as Salesforce/blip-image-captioning-base."
            ) from error
        self._model.eval().to(device)

    @torch.no_grad()
    def caption(self, image: Image.Image) -> str:
        """One image's caption on one line, the same every time; it may be empty.

        Raises:
            BaseModelError: The model cannot be asked in this way.
        """
        chats = getattr(self._processor, "chat_template", None) is not None
        try:
            inputs = self._chat(image) if chats else self._plain(image)
            inputs = inputs.to(self._device, self._model.dtype)
            answer = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        except (ValueError, TypeError) as error:
            raise BaseModelError(f"The captioner {self._name!r} cannot be asked: {_first_line(error)}") from error
        if chats:
            answer = answer[:, inputs["input_ids"].shape[1] :]
        return " ".join(self._processor.batch_decode(answer, skip_special_tokens=True)[0].split())

    def _plain(self, image: Image.Image) -> Any:
        text = {} if self._prompt is None else {"text": self._prompt}
        return self._processor(images=image, return_tensors="pt", **text)

    def _chat(self, image: Image.Image) -> Any:
        asked = [{"type": "image", "image": image}, {"type": "text", "text": self._prompt or QUESTION}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": asked}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def images_to_caption(folder: Path, *, overwrite: bool) -> list[Path]:
    """The images that want a caption, by name.

    Args:
        folder: Of images.
        overwrite: Whether those whose caption is in a `.txt` file want another; one in `metadata.jsonl` stays.

    Raises:
        DataError: The folder is missing or empty, or has faults other than missing captions.
    """
    checkup = examine(folder, background="white")
    faults = [f.message for f in checkup.findings if f.severity == "error" and f.kind != "no caption"]
    if faults:
        raise DataError(f"The folder {str(folder)!r} has faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    captions, _ = read_captions(folder)
    listed = {name for name in captions if not name.endswith(".txt")}
    return [p.path for p in checkup.images if p.path.name not in listed and (overwrite or p.caption is None)]


def write_captions(images: list[Path], captioner: Captioner, *, overwrite: bool = False) -> Iterator[Event]:
    """Write NAME.txt beside each image.

    Args:
        images: From `images_to_caption`.
        captioner: Asked once for each.
        overwrite: Whether a caption that someone has written since is replaced.

    Yields:
        Progress, and a notice for each image that the model has no words for.
    """
    for done, path in enumerate(images, start=1):
        caption = captioner.caption(load_image(path, "white"))
        file = path.with_suffix(".txt")
        if not overwrite and file.is_file() and file.read_text(encoding="utf-8").strip():
            yield Notice(f"{path.name} got a caption meanwhile, which stays.")
        elif caption:
            write_text(file, caption + "\n")
        else:
            yield Notice(f"{path.name}: the model has no words for it; write {path.stem}.txt yourself.")
        yield Progress("captions", done, len(images))
