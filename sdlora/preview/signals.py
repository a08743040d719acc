"""Placeholder until the signals land."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signal:
    """One signal."""

    name: str
    value: float | None
    p_value: float | None
    meaning: str

    @property
    def outside(self) -> bool:
        """Whether it stands out."""
        return self.p_value is not None and self.p_value <= 0.05

    def to_json(self) -> dict[str, Any]:
        """As in copycheck.json."""
        return {"value": self.value, "p_value": self.p_value, "outside": self.outside, "meaning": self.meaning}
