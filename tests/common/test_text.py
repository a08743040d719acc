"""Quantities as people read and write them."""

from __future__ import annotations

import pytest

from sdlora.common.text import format_bytes, format_seconds, parse_bytes
from sdlora.errors import ConfigError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (216_000, "2.5 days")],
)
def test_seconds_are_formatted_in_the_largest_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 KiB"),
        (2**16, "64 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (2**29, "0.50 GiB"),
        (5 * 2**29, "2.50 GiB"),
        (2**41, "2,048.00 GiB"),
    ],
)
def test_sizes_are_formatted_in_the_largest_unit_that_fits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("8GiB", 8 * 2**30), ("12 GB", 12 * 10**9), ("0.5gib", 2**29), ("1024", 1024)]
)
def test_size_with_or_without_unit_is_parsed(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["much", "8 GiBs", "-1GB", "0GB", ""])
def test_malformed_or_zero_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="8GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
