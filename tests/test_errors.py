"""The exit codes of the command line, which scripts rely on."""

from __future__ import annotations

from pathlib import Path

from sdlora import errors

EXIT_CODES = {
    "SdloraError": 1, "ProcessLostError": 1, "ExportError": 1, "EmbedderError": 1,
    "ConfigError": 2, "BaseModelError": 2, "OutputError": 2, "BusyError": 2, "HubError": 2, "StoreError": 2,
    "DataError": 3, "OutOfMemoryError": 4, "DivergedError": 5, "DiskFullError": 6,
}  # fmt: skip


def test_every_error_keeps_its_exit_code() -> None:
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SdloraError)
    }
    assert found == EXIT_CODES


def test_exit_codes_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"| {code} |" in page for code in set(EXIT_CODES.values()))
