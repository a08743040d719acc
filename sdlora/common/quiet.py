"""Silences other libraries' warnings and progress bars in the terminal.

Called before the first of them is imported.
"""

from __future__ import annotations

import logging
import os
import warnings

from sdlora.errors import RenamedOptionWarning


def quiet_libraries() -> None:
    """Silence warnings and progress bars; errors still arrive as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", RenamedOptionWarning)
    for name in ("accelerate", "torch", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Whether this process reports for its run: launchers of several processes set RANK."""
    return os.environ.get("RANK", "0") == "0"
