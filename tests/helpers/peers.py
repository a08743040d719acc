"""Checkouts of other programs, whose own code the tests of `interop` drive; named by environment variables.

What a program imports and is not installed, such as torchvision or its web server, is left empty: its reading of LoRA
files needs torch alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest


def checkout(variable: str) -> Path:
    """The folder that a variable names; without one, the test is skipped, and says so."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout")
    return Path(folder)


class _Empty(MagicMock):
    """A module of which everything can be imported, and nothing is computed."""

    __path__: Sequence[str] = ()
    __spec__ = None

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module that no other finder has found."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def importing(*folders: Path, empty: Sequence[str] = (), own: Sequence[str] = ()) -> Iterator[None]:
    """Import from folders within the block.

    Args:
        empty: Packages that are left empty if they are missing.
        own: Packages of the folders, which are forgotten afterwards.
    """
    missing = [name for name in empty if importlib.util.find_spec(name) is None]
    before, finder = list(sys.path), _Missing(missing)
    sys.path[:0] = [str(folder) for folder in folders]
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.path[:] = before
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in (*own, *missing)]:
            del sys.modules[name]
