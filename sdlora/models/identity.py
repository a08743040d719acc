"""What a module computes, as a hash: its weights and its settings. Cache keys and checkpoints of a run hold it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def weights_identity(module: nn.Module, *descriptions: Any) -> str:
    """A hash of a module's weights and of whatever else decides what it computes."""
    digest = hashlib.blake2b(digest_size=16)
    for description in descriptions:
        # Keys that begin with an underscore say where a network was loaded from, and by which version.
        settings = {key: value for key, value in dict(description).items() if not str(key).startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"))
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
