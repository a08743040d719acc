"""Pictures and captions: from a folder to tensors. Floor 2; the cache of tensors is on floor 4."""
