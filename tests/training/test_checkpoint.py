import json
from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer

from sdlora.errors import OutputError
from sdlora.events import CheckpointDue
from sdlora.lora.inject import AdapterSpec
from sdlora.training.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from sdlora.training.trainer import Trainer


def train_and_save(trainer: Trainer, folder: Path) -> list[Path]:
    return [
        save_checkpoint(folder, trainer, {"note": trainer.position.step})
        for event in trainer.events()
        if isinstance(event, CheckpointDue)
    ]


def test_loaded_checkpoint_restores_the_trainer(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, checkpoint_every_steps=1)
    saved = train_and_save(trainer, tmp_path / "c")
    assert len(saved) == 5
    assert complete_checkpoints(tmp_path / "c") == saved[-2:]
    other = make_trainer(tiny_base, images, tmp_path)
    assert load_checkpoint(saved[-1], other) == {"note": 5}
    # Saved before the epoch's end was reported, so the epoch's sum is still there.
    assert (other.position.step, other.position.loss_count) == (trainer.position.step, 10) == (5, 10)
    for ours, theirs in zip(trainer.step.parameters, other.step.parameters, strict=True):
        assert torch.equal(ours, theirs)
    states = [t.step.optimizer.state_dict()["state"] for t in (trainer, other)]
    assert states[0].keys() == states[1].keys()
    for index, values in states[0].items():
        assert values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, states[1][index][name]) for name, value in values.items())


def test_loaded_checkpoint_restores_initial_factors(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, spec=AdapterSpec(init="pissa"))
    saved = save_checkpoint(tmp_path / "c", trainer, {})
    other = make_trainer(tiny_base, images, tmp_path, spec=AdapterSpec(init="pissa"))
    for start in other.adapter.initial_factors():
        start.neg_()  # as another machine's singular vectors may come out
    load_checkpoint(saved, other)
    assert len(other.adapter.initial_factors()) == 2 * len(other.adapter.layers)
    for ours, theirs in zip(trainer.adapter.initial_factors(), other.adapter.initial_factors(), strict=True):
        assert torch.equal(ours, theirs)


def test_incomplete_checkpoint_is_ignored(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, checkpoint_every_steps=2)
    saved = train_and_save(trainer, tmp_path / "c")
    (saved[-1] / "complete.json").unlink()
    assert complete_checkpoints(tmp_path / "c") == [saved[-2]]
    assert complete_checkpoints(tmp_path / "nowhere") == []


def test_checkpoint_of_another_adapter_is_refused(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    saved = save_checkpoint(tmp_path / "c", trainer, {})
    trainer.adapter.layers.popitem()
    with pytest.raises(OutputError, match="another adapter"):
        load_checkpoint(saved, trainer)


def test_changed_content_is_refused(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    saved = save_checkpoint(tmp_path / "c", trainer, {"losses": {1: 0.25}})
    assert load_checkpoint(saved, trainer) == {"losses": {"1": 0.25}}
    tensors, counters = saved / "state.safetensors", saved / "complete.json"
    content = bytearray(tensors.read_bytes())
    content[-100] ^= 1
    before = tensors.read_bytes()
    tensors.write_bytes(content)
    with pytest.raises(OutputError, match="damaged"):
        load_checkpoint(saved, trainer)
    tensors.write_bytes(before)
    counters.write_text(counters.read_text().replace("0.25", "0.26"))
    with pytest.raises(OutputError, match="damaged"):
        load_checkpoint(saved, trainer)


HALF = {"format": 1, "position": {}, "optimizer": {"state": {}, "groups": []}, "extra": {}}


@pytest.mark.parametrize(
    "content",
    [[], 7, None, {}, {"position": {"step": 1}}, HALF, HALF | {"optimizer": {}}, HALF | {"position": {"step": "many"}}],
)
def test_last_file_of_something_else_is_refused(tiny_base: Path, images: Path, tmp_path: Path, content: object) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    saved = save_checkpoint(tmp_path / "c", trainer, {})
    (saved / "complete.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="damaged"):
        load_checkpoint(saved, trainer)


def test_later_format_is_refused_by_version_whatever_its_files_are(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path)
    saved = save_checkpoint(tmp_path / "c", trainer, {})
    (saved / "complete.json").write_text(json.dumps({"format": 2, "version": "9.8.7", "tensors": "state.bin"}))
    (saved / "state.safetensors").unlink()
    with pytest.raises(OutputError, match=r"sdlora 9\.8\.7.*number 2"):
        load_checkpoint(saved, trainer)
