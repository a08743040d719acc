"""Quantities as people read them, and sizes as they write them.

Used by messages, tables and pages in every room above.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdlora.errors import ConfigError

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def format_seconds(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s, 2 h 07 min or, from two days on, 2.5 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole >= 2 * 86400:
        return f"{whole / 86400:.1f} days"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_range(lowest: int, highest: int) -> str:
    """A number, or two as 2 to 5 where they differ."""
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"


def format_bytes(num_bytes: float) -> str:
    """Sizes of memory and files as 7.25 GiB, 12.3 MiB or 64 KiB, in the largest unit of which they make a tenth."""
    if num_bytes >= 2**30 / 10:
        return f"{num_bytes / 2**30:,.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 / 10 else f"{num_bytes / 2**10:.0f} KiB"


def sparkline(values: Sequence[float]) -> str:
    """Numbers of at least 0 as a line of bars, the highest of them full."""
    highest = max(values, default=0) or 1
    return "".join(_BARS[round(value / highest * (len(_BARS) - 1))] for value in values)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB, 7.5 GB or 8589934592.

    Raises:
        ConfigError: The text is not a size above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"cannot parse {text!r} as a size; use 8GiB, 12GB or a number of bytes")
    return round(float(match[1]) * _UNITS[match[2]])
