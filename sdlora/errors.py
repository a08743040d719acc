"""Every error that sdlora raises on purpose, with the exit code the command line ends in.

Imports nothing of sdlora. A user's mistake is always an `SdloraError`; anything else is a bug of ours.
"""

from __future__ import annotations


class SdloraError(Exception):
    """Base of all errors a user can cause or meet; the message says what is wrong and what to do next."""

    exit_code = 1


class ConfigError(SdloraError):
    """The configuration is wrong; the message lists every fault at once."""

    exit_code = 2


class BaseModelError(SdloraError):
    """The base model does not exist, cannot be read, or is of a kind that sdlora does not train."""

    exit_code = 2


class OutputError(SdloraError):
    """The output folder cannot be used: it holds another run, or cannot be written."""

    exit_code = 2


class BusyError(SdloraError):
    """Another run works in this folder or on this device."""

    exit_code = 2


class DataError(SdloraError):
    """The images or captions are missing or broken; the message names each file."""

    exit_code = 3


class HubError(SdloraError):
    """The Hugging Face Hub cannot be reached, or refuses."""

    exit_code = 2


class StoreError(SdloraError):
    """A store at a URL cannot be reached, refuses, or has no driver here."""

    exit_code = 2


class OutOfMemoryError(SdloraError):
    """The device ran out of memory; the message names the setting to lower."""

    exit_code = 4


class DivergedError(SdloraError):
    """The loss or the adapter became NaN or infinite."""

    exit_code = 5


class DiskFullError(SdloraError):
    """There is not enough room on the disk."""

    exit_code = 6


class ProcessLostError(SdloraError):
    """Another process of the same run ended, so that this one cannot go on."""

    exit_code = 1


class ExportError(SdloraError):
    """A written LoRA file did not reproduce the trained model when it was loaded back."""

    exit_code = 1


class ArbiterError(SdloraError):
    """An optional network that was asked for is not to be had; the run goes on without it and says so."""

    exit_code = 1


class RenamedOptionWarning(UserWarning):
    """An option was given under its earlier name."""
