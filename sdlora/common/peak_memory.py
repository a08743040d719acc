"""Peak memory since a moment: of the GPU if there is one, else of this process.

Used by a batch, for its results and its dry run.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class PeakMemory:
    """Measures from its creation; creating another one restarts the measurement."""

    def __init__(self) -> None:
        self._resets = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            (_PROC / "clear_refs").write_text("5")  # Linux: resets the high-water mark to what is resident now
            self._resets = True

    def num_bytes(self) -> int | None:
        """The peak so far; None where the system knows only the peak of the process's whole life."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self._resets:
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text(encoding="utf-8"))
        return int(found.group(1)) * 1024 if found else None
