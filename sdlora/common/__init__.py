"""Foundations that every room may use: files, locks, seeds, signals, bundled data."""
