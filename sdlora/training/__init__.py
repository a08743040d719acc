"""The training loop as an iterator of events, its learning rates and its checkpoints. Floor 5."""
