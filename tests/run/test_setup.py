"""What is loaded for a run, and how."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdlora.config.toml import parse_config
from sdlora.run import setup


@pytest.fixture
def products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, "high"),
        ("cuda", torch.float16, "high"),
        ("cuda", torch.float32, "highest"),
        ("cpu", torch.bfloat16, "medium"),
    ],
)
def test_float32_matmul_precision_on_a_gpu_follows_the_unets_type(
    device: str, dtype: torch.dtype, expected: str, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("medium")  # what a CPU is left at
    monkeypatch.setattr(setup, "load_base", lambda *_, **__: SimpleNamespace())
    config = parse_config({"data": {"folder": "x"}}, name="x")
    setup.fresh_base(config, torch.device(device), dtype)
    assert torch.get_float32_matmul_precision() == expected
