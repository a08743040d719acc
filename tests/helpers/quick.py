"""What tests leave out of a run to make it quick, where what is left out is not their point."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sdlora.copycheck import null_distribution
from sdlora.run import estimate

Replace = Callable[[Any, str, Any], None]
"""`setattr`, or one that is undone later."""


def leave_out_fsync(replace: Replace = setattr) -> None:
    """Files stay in the system's memory: only a loss of power would show it, and no test has one."""
    replace(os, "fsync", lambda _: None)


def shrink_null_distribution(replace: Replace = setattr) -> None:
    """The base model draws a few images for the copy check, not a hundred."""
    for module in (null_distribution, estimate):
        replace(module, "SIZE", 12)
        replace(module, "MIN_DRAWN", 4)
