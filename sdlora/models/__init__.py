"""Base models: the protocol they share, one file per family, loading and detection."""
