"""Run folders, the queue, uploads and image sets."""
