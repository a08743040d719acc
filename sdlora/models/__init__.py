"""Base models: what they share, one file per family, loading and detection."""
