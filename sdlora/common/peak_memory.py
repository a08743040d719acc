"""The most memory that was held since some moment: of the GPU where there is one, else of this process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class PeakMemory:
    """Measures from when it is made; another one made meanwhile takes over."""

    def __init__(self) -> None:
        self._resets = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            (_PROC / "clear_refs").write_text("5")  # Linux: the high-water mark falls to what is resident now
            self._resets = True
        except OSError:
            pass

    def num_bytes(self) -> int | None:
        """The peak so far; None where the system tells only that of the process's whole life, other jobs included."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self._resets:
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text(encoding="utf-8"))
        return int(found.group(1)) * 1024 if found else None
