"""LoRA files of any trainer: names, reading, writing, verification, merging."""
