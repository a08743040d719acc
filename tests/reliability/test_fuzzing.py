"""Readers of what strangers send, fuzzed by the branches that they take (`fuzzing.py`)."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.promises import Figure
from PIL import Image
from safetensors.torch import save

PROGRAM = Path(__file__).parents[1] / "helpers" / "fuzzing.py"
NUM_RUNS = 4000
MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def captions() -> bytes:
    return b'{"file_name": "a.png", "text": "zumi"}\n{"file_name": "b/c.png", "text": "a \\u00e9"}\n'


def configuration() -> bytes:
    return b'seed = 3\n[data]\nfolder = "x"\ntrigger = "zumi"\nclass_words = ["a cat"]\n[lora]\nrank = 4\n'


def lora() -> bytes:
    weights = {f"{MODULE}.lora_down.weight": torch.ones(1, 2), f"{MODULE}.lora_up.weight": torch.ones(2, 1)}
    return save(weights | {f"{MODULE}.alpha": torch.tensor(1.0)}, {"ss_network_dim": "1"})


def archive() -> bytes:
    image, whole = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("a.png", image.getvalue())
        file.writestr("b/a.txt", "zumi")
    return whole.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "make"),
    [("captions", captions), ("configuration", configuration), ("lora", lora), ("zip", archive)],
)
def test_whatever_is_sent_is_read_or_refused(
    reader: str, make: Callable[[], bytes], tmp_path: Path, figure: Figure
) -> None:
    pytest.importorskip("atheris")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "whole").write_bytes(make())
    done = subprocess.run(
        [sys.executable, str(PROGRAM), reader, f"-runs={NUM_RUNS}", "-seed=1", str(tmp_path / "corpus")],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"Done {NUM_RUNS} runs", done.stderr)
    figure("Fuzzed readers", f"{NUM_RUNS} inputs of each of 4 sorts: read, or refused in words")
