"""A checkpoint on a machine that does not see the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.trainer import make_trainer

from sdlora.run.resume import load_newest
from sdlora.training.checkpoint import save_checkpoint
from sdlora.training.distributed import Processes


class Wire(Processes):
    """Keeps what the main process says, for another one to hear it later."""

    def __init__(self, index: int, said: list[Any]) -> None:
        super().__init__(index, 2)
        self._said = said

    def agree(self, value: Any) -> Any:
        if self.is_main:
            self._said.append(value)
            return value
        return self._said.pop(0)

    def any(self, value: bool) -> bool:
        return True


def test_checkpoint_is_sent_to_machines_that_do_not_see_it(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    main, other = (make_trainer(tiny_base, images, tmp_path) for _ in range(2))
    for _ in main.events(lambda: main.position.step == 3):
        pass
    saved = save_checkpoint(tmp_path / "checkpoints", main, {"note": 7})
    said: list[Any] = []
    main.processes, other.processes = Wire(0, said), Wire(1, said)
    assert load_newest([saved], main) == {"note": 7}
    shutil.rmtree(saved)
    assert load_newest([], other) == {"note": 7}
    assert not said and other.position.step == main.position.step == 3
    for here, there in zip(main.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(here, there)
    assert load_newest([], main) is None
