"""Batches of quick jobs."""

from __future__ import annotations

QUICK = """
[data]
repeats = 8
[train]
epochs = 2
batch_size = 2
checkpoint_every_steps = 4
log_every_steps = 1
[lora]
rank = 2
[preview]
num_steps = 2
seeds = [0]
num_captions = 0
prompts = ["a ball"]
[copycheck]
enabled = false
"""
