"""Headers of safetensors files: truncated, foreign and pickled files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bases import Layouts, refused
from helpers.ldm import write_checkpoint


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickled_checkpoint_is_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"model{ending}").write_bytes(b"x")
    reason = refused(tmp_path / f"model{ending}")
    assert "pickled checkpoint" in reason
    assert "torch.load(FILE, weights_only=True)" in reason


def test_truncated_or_foreign_file_is_refused(tmp_path: Path, layouts: Layouts, small: None) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, layouts["sd1"])
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1000):
        file.write_bytes(whole[:length])
        assert "base.safetensors is truncated" in refused(file)
    for content in (b"", b"PK\x03\x04" * 9, (20).to_bytes(8, "little") + b"{" * 20, b"\x80\x04pickle" * 3):
        file.write_bytes(content)
        assert "not a safetensors file" in refused(file)
