"""What tests leave out of a run to make it quick, where what is left out is not their point."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Replace = Callable[[Any, str, Any], None]
"""`setattr`, or one that is undone later."""


def leave_out_fsync(replace: Replace = setattr) -> None:
    """Files stay in the system's memory: only a loss of power would show it, and no test has one."""
    replace(os, "fsync", lambda _: None)
