"""Latents and text embeddings on disk, keyed by content."""
