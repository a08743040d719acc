"""Captions by a tiny random model, held against the model's own class asked by hand."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.captioners import make
from helpers.command import call
from PIL import Image
from transformers import (
    AutoProcessor,
    BlipForConditionalGeneration,
    GitForCausalLM,
)

from sdlora.common import locks
from sdlora.common.locks import hold, holder
from sdlora.data.captioner import Captioner, images_to_caption, write_captions
from sdlora.errors import BaseModelError, DataError
from sdlora.events import Notice


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("blip", tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a mask; b has a caption, c one in the list."""
    found = tmp_path / "pictures"
    found.mkdir()
    draw = torch.Generator().manual_seed(1)
    for name in ("a.png", "b.png", "c.png"):
        noise = torch.randint(0, 255, (4, 4, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((40, 30)).save(found / name)
    Image.new("L", (40, 30), 255).save(found / "a-mask.png")
    (found / "b.txt").write_text("my own words")
    (found / "metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "text": "listed"}))
    return found


def by_hand(kind: str, model: Path, image: Path) -> str:
    """The caption by the model's own class."""
    network = {"blip": BlipForConditionalGeneration, "git": GitForCausalLM}[kind].from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    pixels = processor(images=Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        answer = network.generate(pixel_values=pixels, max_new_tokens=60, do_sample=False)
    return str(processor.decode(answer[0], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_generated_captions_are_written_beside_the_images(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(kind, tmp_path / kind)
    code, out, err = call(capsys, "caption", str(folder), "--model", str(model))
    assert (code, "1 caption written" in out) == (0, True), err
    expected = by_hand(kind, model, folder / "a.png")
    assert expected
    assert (folder / "a.txt").read_text() == expected + "\n"
    assert sorted(path.name for path in folder.glob("*.txt")) == ["a.txt", "b.txt"]
    assert (folder / "b.txt").read_text() == "my own words"


def test_existing_captions_are_kept_without_overwrite(
    folder: Path, blip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text("mine, too")
    code, out, _ = call(capsys, "caption", str(folder), "--model", str(blip))
    assert (code, "Every image in" in out) == (0, True)
    assert (folder / "a.txt").read_text() == "mine, too"
    assert [path.name for path in images_to_caption(folder, overwrite=True)] == ["a.png", "b.png"]
    code, _, err = call(capsys, "caption", str(folder), "--model", str(blip), "--overwrite", "--max-tokens", "5")
    assert code == 0, err
    assert (folder / "a.txt").read_text() == by_hand_of(blip, folder / "a.png", 5)
    assert (folder / "b.txt").read_text() != "my own words"
    assert json.loads((folder / "metadata.jsonl").read_text())["text"] == "listed"


def by_hand_of(model: Path, image: Path, max_tokens: int) -> str:
    captioner = Captioner(str(model), device=torch.device("cpu"), max_tokens=max_tokens)
    found = captioner.caption(Image.open(image).convert("RGB"))
    assert len(found.split()) <= max_tokens
    return found + "\n"


def test_captions_begin_with_the_prompt(folder: Path, blip: Path) -> None:
    captioner = Captioner(str(blip), device=torch.device("cpu"), prompt="the red cat")
    assert captioner.caption(Image.open(folder / "a.png")).startswith("the red cat")


def test_chat_model_gets_the_question_and_only_its_answer_is_kept(
    folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner(str(blip), device=torch.device("cpu"), prompt="What is this?")
    asked: list[Any] = []

    class Inputs(dict[str, torch.Tensor]):
        def to(self, *_: object) -> Inputs:
            return self

    def template(messages: Any, **options: Any) -> Inputs:
        asked.append((messages, options))
        return Inputs(input_ids=torch.tensor([[2, 11, 12]]))

    monkeypatch.setattr(captioner._processor, "chat_template", "a template", raising=False)
    monkeypatch.setattr(captioner._processor, "apply_chat_template", template, raising=False)
    monkeypatch.setattr(captioner._model, "generate", lambda **_: torch.tensor([[2, 11, 12, 5, 8, 9, 3]]))
    image = Image.open(folder / "a.png")
    assert captioner.caption(image) == "a red ball"
    ((message,), options), *_ = asked
    assert message["content"] == [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    assert options["add_generation_prompt"] is True


def test_empty_caption_is_not_written(folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner(str(blip), device=torch.device("cpu"))
    monkeypatch.setattr(captioner, "caption", lambda _: "")
    events = list(write_captions([folder / "a.png"], captioner))
    (notice,) = (event.message for event in events if isinstance(event, Notice))
    assert "a.png" in notice and "a.txt" in notice
    assert not (folder / "a.txt").exists()


def test_caption_written_in_the_meantime_is_kept(folder: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner(str(blip), device=torch.device("cpu"))

    def slow(_: Image.Image) -> str:
        (folder / "a.txt").write_text("typed while the model thought")
        return "a dog"

    monkeypatch.setattr(captioner, "caption", slow)
    told = [event.message for event in write_captions([folder / "a.png"], captioner) if isinstance(event, Notice)]
    assert len(told) == 1 and "a.png" in told[0]
    assert (folder / "a.txt").read_text() == "typed while the model thought"
    list(write_captions([folder / "a.png"], captioner, overwrite=True))
    assert (folder / "a.txt").read_text() == "a dog\n"


def test_captioner_waits_for_the_gpu(
    folder: Path, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, other = tmp_path / "gpu.lock", ExitStack()
    other.enter_context(hold(lock, "sdlora train in runs/x"))
    monkeypatch.setattr(locks, "device_lock", lambda _: lock)
    monkeypatch.setattr(locks.time, "sleep", lambda _: other.close())
    code, _, err = call(capsys, "caption", str(folder), "--model", str(blip))
    assert (code, holder(lock)) == (0, None)
    assert "Waiting for the GPU, which is in use by" in " ".join(err.split()) and "runs/x" in err


def test_unusable_model_is_refused_and_its_code_never_run(
    folder: Path, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = call(capsys, "caption", str(folder), "--model", "nobody/nothing")
    told = " ".join(err.split())
    assert (code, out) == (2, "")
    assert "'nobody/nothing'" in told and "HF_HUB_OFFLINE" in told
    evil = tmp_path / "evil"
    evil.mkdir()
    code_of = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"), "code.Evil")
    config = {"model_type": "never-heard-of", "auto_map": code_of}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "code.Evil"}}))
    (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\n\nclass Evil:\n    pass\n")
    with pytest.raises(BaseModelError, match="evil"):
        Captioner(str(evil), device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    pickled = tmp_path / "pickled"
    BlipForConditionalGeneration.from_pretrained(blip).config.save_pretrained(pickled)
    AutoProcessor.from_pretrained(blip).save_pretrained(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="safetensors"):
        Captioner(str(pickled), device=torch.device("cpu"))


def test_folder_with_a_broken_image_is_refused(folder: Path) -> None:
    (folder / "d.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"d\.png"):
        images_to_caption(folder, overwrite=False)
