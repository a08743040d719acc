"""The version of sdlora, as files and `--version` state it."""

__version__ = "0.1.0"
