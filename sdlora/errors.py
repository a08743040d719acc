"""Every error that sdlora raises on purpose, with the exit code of the command line.

Imports nothing of sdlora. A user's mistake is always an `SdloraError`; any other exception is a bug.
"""

from __future__ import annotations


class SdloraError(Exception):
    """Base of all errors a user can cause or meet; the message says what is wrong and what to do next."""

    exit_code = 1


class ConfigError(SdloraError):
    """The configuration is invalid; the message lists every error at once."""

    exit_code = 2


class BaseModelError(SdloraError):
    """The base model does not exist, cannot be read, or is not of a supported family."""

    exit_code = 2


class OutputError(SdloraError):
    """The output folder cannot be used: it holds another run, or is not writable."""

    exit_code = 2


class BusyError(SdloraError):
    """Another run is using this folder or device."""

    exit_code = 2


class DataError(SdloraError):
    """The images or captions are missing or broken; the message names each file."""

    exit_code = 3


class HubError(SdloraError):
    """The Hugging Face Hub cannot be reached, or denies the request."""

    exit_code = 2


class StoreError(SdloraError):
    """A store at a URL cannot be reached, denies the request, or needs a driver that is not installed."""

    exit_code = 2


class OutOfMemoryError(SdloraError):
    """The device ran out of memory; the message names the setting to lower."""

    exit_code = 4


class DivergedError(SdloraError):
    """The loss or the adapter became NaN or infinite."""

    exit_code = 5


class DiskFullError(SdloraError):
    """There is not enough disk space."""

    exit_code = 6


class ProcessLostError(SdloraError):
    """Another process of the same run ended, so this one cannot continue."""


class ExportError(SdloraError):
    """A written LoRA file did not reproduce the trained model when loaded back."""


class EmbedderError(SdloraError):
    """An optional network of the copy check could not be loaded; the run continues without it and says so."""


class RenamedOptionWarning(UserWarning):
    """An option was given under its earlier name."""
